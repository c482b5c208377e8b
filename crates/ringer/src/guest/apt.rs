//! Fetches Debian packages by the host's own apt, as an ordinary user: state, cache and locks live in a directory of
//! ours, so that nothing of the host's package management is read or written besides its list of sources and keys.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use super::Error;
use crate::cleanup;

/// Where Debian's own keys are on hosts that have them. Other distributions need the package `debian-archive-keyring`.
const KEYRINGS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"];

/// A private apt for one architecture. All its files are in one directory, which the caller removes.
pub struct Apt<'a> {
    directory: PathBuf,
    /// Called with the percentage done of the step under way.
    progress: &'a dyn Fn(u64),
    /// What `update` complained of. It may not matter (a third party's source that is down), so it is only told when
    /// a package is then missing.
    update_error: Option<String>,
}

impl<'a> Apt<'a> {
    /// Fetches the package lists.
    pub fn new(directory: &Path, architecture: &str, progress: &'a dyn Fn(u64)) -> Result<Self, Error> {
        let io_error = |source| Error::Cache { path: directory.into(), source };
        for path in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(path)).map_err(io_error)?;
        }
        fs::write(directory.join("status"), "").map_err(io_error)?;
        fs::write(directory.join("config"), configuration(directory, architecture)).map_err(io_error)?;
        let mut apt = Apt { directory: directory.into(), progress, update_error: None };
        // Where only some sources fail, apt-get succeeds and warns.
        apt.update_error = match apt.run("apt-get", &["update"]) {
            Err(Error::Apt { why }) => Some(why),
            other => other.map(|_| apt.complaints("W: "))?,
        };
        Ok(apt)
    }

    /// The first package that `package` depends on and whose name starts with `prefix`.
    pub fn dependency(&self, package: &str, prefix: &str) -> Result<String, Error> {
        let output = self.run("apt-cache", &["depends", "--important", package]).map_err(|e| self.blame(e))?;
        output
            .lines()
            .filter_map(|line| line.trim_start().strip_prefix("Depends: "))
            .find(|name| name.starts_with(prefix))
            .map(String::from)
            .ok_or_else(|| self.blame(Error::Apt { why: format!("apt knows no {prefix}* for {package}") }))
    }

    /// Downloads a package (apt checks its signature chain) and returns the path of its .deb.
    pub fn download(&self, package: &str) -> Result<PathBuf, Error> {
        self.run("apt-get", &["download", package]).map_err(|e| self.blame(e))?;
        let io_error = |source| Error::Cache { path: self.directory.clone(), source };
        let prefix = format!("{package}_");
        for entry in fs::read_dir(&self.directory).map_err(io_error)? {
            let entry = entry.map_err(io_error)?;
            let name = entry.file_name();
            if name.to_string_lossy().starts_with(&prefix) && entry.path().extension().is_some_and(|e| e == "deb") {
                return Ok(entry.path());
            }
        }
        Err(Error::Apt { why: format!("apt-get download {package} succeeded, but left no package") })
    }

    /// A release of Debian and the sources.list(5) lines by which the host gets it. `suite`: its code name; `None`: that of
    /// the host's Debian, or of the first release that the host's sources have.
    pub fn debian_sources(&self, suite: Option<&str>) -> Result<(String, Vec<String>), Error> {
        let format = "$(CODENAME) deb $(REPO_URI) $(RELEASE) $(COMPONENT)";
        let output =
            self.run("apt-get", &["indextargets", "--format", format, "Created-By: Packages", "Origin: Debian"]);
        let output = output.map_err(|e| self.blame(e))?;
        let known: Vec<(&str, &str)> = output.lines().filter_map(|line| line.split_once(' ')).collect();
        let host = host_codename();
        let own = host.as_deref().filter(|host| known.iter().any(|(name, _)| name == host));
        let suite = suite.or(own).or(known.first().map(|(name, _)| *name));
        let missing = || self.blame(Error::Apt { why: "the host's apt has no source of Debian".into() });
        let suite = suite.ok_or_else(missing)?;
        // A release comes with its updates and security fixes: NAME-updates, NAME-security.
        let belongs =
            |name: &str| name.strip_prefix(suite).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'));
        let mut lines: Vec<_> =
            known.iter().filter(|(name, _)| belongs(name)).map(|(_, line)| (*line).to_owned()).collect();
        lines.sort();
        lines.dedup();
        if lines.is_empty() {
            // Any other release is on the server that the host's own comes from.
            let (_, line) = known.iter().find(|(name, _)| !name.contains('-')).ok_or_else(missing)?;
            let uri = line.split(' ').nth(1).unwrap_or_default();
            lines.push(format!("deb {uri} {suite} main"));
        }
        Ok((suite.to_owned(), lines))
    }

    /// Adds why the update failed, if it did, to the error that follows from it.
    fn blame(&self, error: Error) -> Error {
        match (error, &self.update_error) {
            (Error::Apt { why }, Some(update)) => Error::Apt { why: format!("{why}; {update}") },
            (error, _) => error,
        }
    }

    /// Runs an apt program to its end and returns what it printed.
    fn run(&self, program: &str, arguments: &[&str]) -> Result<String, Error> {
        let failed = |why: String| Error::Apt { why };
        let errors = self.directory.join("errors");
        let io_error = |source| Error::Cache { path: errors.clone(), source };
        let mut child = Command::new(program)
            .arg("-c")
            .arg(self.directory.join("config"))
            .arg("-q")
            .args(arguments)
            .current_dir(&self.directory)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&errors).map_err(io_error)?)
            .spawn()
            .map_err(|e| match e.kind() {
                io::ErrorKind::NotFound => failed(format!("this host has no {program}")),
                _ => failed(format!("can't start {program}: {e}")),
            })?;
        let stdout = child.stdout.take();
        let child = Arc::new(Mutex::new(child));
        let kill = cleanup::register({
            let child = child.clone();
            move || _ = lock(&child).kill()
        });
        let output = stdout.map(|pipe| self.follow(pipe)).transpose();
        let status = lock(&child).wait();
        kill.cancel();
        let output = output.map_err(io_error)?.unwrap_or_default();
        if status.map_err(io_error)?.success() {
            return Ok(output);
        }
        let complaint = self.complaints("E: ").unwrap_or_else(|| "it failed".into());
        Err(failed(format!("{program} {}: {complaint}", arguments.join(" "))))
    }

    /// The first lines of this kind on the stderr of the last run.
    fn complaints(&self, kind: &str) -> Option<String> {
        let text = fs::read_to_string(self.directory.join("errors")).ok()?;
        let lines: Vec<_> = text.lines().filter_map(|line| line.strip_prefix(kind)).take(2).collect();
        (!lines.is_empty()).then(|| lines.join("; "))
    }

    /// Reads a program's output and reports the progress lines in it (`APT::Status-Fd`).
    fn follow(&self, pipe: impl Read) -> io::Result<String> {
        let mut output = String::new();
        for line in BufReader::new(pipe).lines() {
            let line = line?;
            match line.strip_prefix("dlstatus:") {
                Some(status) => {
                    let percent = status.split(':').nth(1).and_then(|text| text.parse::<f64>().ok());
                    (self.progress)(percent.unwrap_or(0.0).clamp(0.0, 100.0) as u64);
                }
                None => {
                    output.push_str(&line);
                    output.push('\n');
                }
            }
        }
        Ok(output)
    }
}

fn lock(child: &Mutex<Child>) -> std::sync::MutexGuard<'_, Child> {
    child.lock().unwrap_or_else(PoisonError::into_inner)
}

/// On a host whose own sources are not Debian's, this variable names a Debian mirror by its URL.
const MIRROR: &str = "RINGER_DEBIAN_MIRROR";

/// What we set on top of the host's configuration (apt.conf(5)), of which proxies and sources stay in force.
fn configuration(directory: &Path, architecture: &str) -> String {
    let root = directory.display();
    let mut text = format!(
        r#"Dir::State "{root}/state";
Dir::State::status "{root}/status";
Dir::Cache "{root}/cache";
APT::Architecture "{architecture}";
#clear APT::Architectures;
APT::Architectures {{ "{architecture}"; }};
APT::Sandbox::User "root";
APT::Status-Fd "1";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons-small::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons::DefaultEnabled "false";
Acquire::IndexTargets::deb::CNF::DefaultEnabled "false";
"#
    );
    if let (false, Ok(mirror)) = (host_is_debian(), std::env::var(MIRROR)) {
        let keyring = KEYRINGS.iter().find(|path| Path::new(path).exists()).copied().unwrap_or(KEYRINGS[0]);
        let sources = directory.join("sources.list");
        let line = format!("deb [signed-by={keyring}] {mirror} stable main\n");
        // Where this fails, so will apt, which then names the file.
        _ = fs::write(&sources, line);
        text += &format!("Dir::Etc::sourcelist \"{root}/sources.list\";\nDir::Etc::sourceparts \"/dev/null\";\n");
    }
    text
}

/// Whether the host's own sources are Debian's.
fn host_is_debian() -> bool {
    os_release("ID").as_deref() == Some("debian")
}

fn host_codename() -> Option<String> {
    host_is_debian().then(|| os_release("VERSION_CODENAME")).flatten()
}

/// What the host's os-release(5) says of itself.
fn os_release(key: &str) -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    let value = text.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='))?;
    Some(value.trim_matches('"').to_owned())
}
