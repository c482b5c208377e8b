use super::*;
use chipset::flash::{Backing, Image};
use chipset::fw_cfg::{Content, Name};
use std::fs;
use std::path::Path;

/// An image with a jump at its end.
fn bios(directory: &Path, size: usize) -> PathBuf {
    let mut content = vec![0xff; size];
    content[size - 16..size - 11].copy_from_slice(&[0xea, 0x5b, 0xe0, 0x00, 0xf0]);
    let path = directory.join("bios.bin");
    fs::write(&path, content).unwrap();
    path
}

/// A firmware volume's header, of one with variables or another.
fn volume(variables: bool, size: usize) -> Vec<u8> {
    let mut content = vec![0xff; size];
    content[..16].fill(0);
    if variables {
        content[16..32].copy_from_slice(&[
            0x8d, 0x2b, 0xf1, 0xff, 0x96, 0x76, 0x8b, 0x4c, 0xa9, 0x85, 0x27, 0x47, 0x07, 0x5b, 0x4f, 0x50,
        ]);
    }
    content[40..44].copy_from_slice(b"_FVH");
    content[size - 16] = 0xea;
    content
}

fn write(directory: &Path, name: &str, content: Vec<u8>) -> PathBuf {
    let path = directory.join(name);
    fs::write(&path, content).unwrap();
    path
}

fn why(config: &FirmwareConfig) -> String {
    match prepare(&Ram::new(64 << 20).unwrap(), config) {
        Err(error) => error.to_string(),
        Ok(_) => "it worked".into(),
    }
}

fn text(firmware: &Firmware, name: &str) -> Option<Vec<u8>> {
    let item = firmware.items.iter().find(|item| item.name == Name::File(name.into()))?;
    match &item.content {
        Content::Bytes(bytes) => Some(bytes.clone()),
        Content::File { .. } | Content::Register(_) => None,
    }
}

#[test]
fn a_bios_is_a_rom_and_is_told_of_ram_and_boot_order() {
    let directory = tempfile::tempdir().unwrap();
    let config = FirmwareConfig {
        image: bios(directory.path(), 0x4_0000),
        cpus: Topology::of_cores(2),
        boot_order: vec!["/a".into(), "/b".into()],
        serial_console: Some(0x3f8),
        ..FirmwareConfig::default()
    };
    let firmware = prepare(&Ram::new(4 << 30).unwrap(), &config).unwrap();
    assert!(matches!(&firmware.image, Image::Rom(content) if content.len() == 0x4_0000));
    assert_eq!(text(&firmware, "bootorder").unwrap(), b"/a\n/b\0");
    assert_eq!(text(&firmware, "etc/sercon-port").unwrap(), [0xf8, 3]);
    let map = text(&firmware, "etc/e820").unwrap();
    assert_eq!(map.len(), 40);
    assert_eq!(map[8..20], [0, 0, 0, 0xb0, 0, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(map[20..28], (4u64 << 30).to_le_bytes());
}

#[test]
fn efi_firmware_gets_its_own_copy_of_the_variables() {
    let directory = tempfile::tempdir().unwrap();
    let own = directory.path().join("own.fd");
    let config = FirmwareConfig {
        image: write(directory.path(), "code.fd", volume(false, 0x2_0000)),
        variables_template: Some(write(directory.path(), "vars.fd", volume(true, 0x1_0000))),
        variables: Some(own.clone()),
        cpus: Topology::of_cores(1),
        ..FirmwareConfig::default()
    };
    let ram = Ram::new(64 << 20).unwrap();
    let Image::Flash(chips) = prepare(&ram, &config).unwrap().image else { unreachable!() };
    assert!(matches!(chips[0].backing, Backing::ReadOnly) && matches!(chips[1].backing, Backing::File(_)));
    let mut changed = fs::read(&own).unwrap();
    assert_eq!(changed, volume(true, 0x1_0000));
    changed[0x2000] = 7;
    fs::write(&own, &changed).unwrap();
    let Image::Flash(chips) = prepare(&ram, &config).unwrap().image else { unreachable!() };
    assert_eq!(chips[1].content, changed);
    fs::write(&own, volume(true, 0x2000)).unwrap();
    assert!(why(&config).contains("this firmware's variables have 65536"));
    fs::write(&own, vec![0; 0x1_0000]).unwrap();
    assert!(why(&config).contains("holds no EFI variables"));
    let volatile = FirmwareConfig { variables: None, ..config };
    let Image::Flash(chips) = prepare(&ram, &volatile).unwrap().image else { unreachable!() };
    assert!(matches!(chips[1].backing, Backing::Volatile));
}

#[test]
fn what_is_no_firmware_is_refused_with_a_reason() {
    let directory = tempfile::tempdir().unwrap();
    let with = |content: Vec<u8>| FirmwareConfig {
        image: write(directory.path(), "image", content),
        cpus: Topology::of_cores(1),
        ..FirmwareConfig::default()
    };
    assert!(why(&with(vec![1; 0x1_0001])).contains("64 KiB to 16 MiB"));
    assert!(why(&with(vec![1; 0x1000])).contains("64 KiB to 16 MiB"));
    assert!(why(&with(vec![0xff; 0x2_0000])).contains("it is empty"));
    assert!(why(&with(Vec::new())).contains("is empty"));
    let own = Some(directory.path().join("none.fd"));
    assert!(why(&FirmwareConfig { variables: own.clone(), ..with(vec![1; 0x2_0000]) }).contains("no EFI firmware"));
    let efi = FirmwareConfig { variables: own, ..with(volume(false, 0x2_0000)) };
    assert!(why(&efi).contains("nothing to make it from"));
    let missing = FirmwareConfig {
        image: directory.path().join("nothing"),
        cpus: Topology::of_cores(1),
        ..FirmwareConfig::default()
    };
    assert!(why(&missing).contains("nothing"));
}

fn roms(directory: &Path) -> OptionRoms {
    let rom = |name, size| Some(write(directory, name, vec![0x55; size]));
    OptionRoms { linux: rom("linux.rom", 512), multiboot: rom("multiboot.rom", 1024) }
}

/// What a numbered item holds; of a file its size.
fn number_of(firmware: &Firmware, number: u16) -> Vec<u8> {
    let item = firmware.items.iter().find(|item| item.name == Name::Number(number)).unwrap();
    match &item.content {
        Content::Bytes(bytes) => bytes.clone(),
        Content::File { size, .. } => size.to_le_bytes().to_vec(),
        Content::Register(_) => Vec::new(),
    }
}

/// A Multiboot kernel of 100 bytes at 1 MiB + 64 KiB, and 4 KiB of zeros.
fn multiboot_kernel() -> Vec<u8> {
    const LOAD: u32 = 0x11_0000;
    let words =
        [0x1bad_b002, 1 << 16, 0u32.wrapping_sub(0x1bad_b002 + (1 << 16)), LOAD + 8, LOAD, 0, LOAD + 4196, LOAD + 40];
    let mut kernel = vec![0x90; 100];
    kernel.get_mut(8..40).unwrap().copy_from_slice(&words.map(u32::to_le_bytes).concat());
    kernel
}

#[test]
fn a_multiboot_kernel_is_handed_over_in_one_piece_with_its_modules() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = write(directory.path(), "kernel", multiboot_kernel());
    let module = write(directory.path(), "module", b"module".to_vec());
    let config = FirmwareConfig {
        image: bios(directory.path(), 0x2_0000),
        kernel: Some(Kernel {
            image: kernel.clone(),
            initrd: vec![module.clone()],
            command_line: "quiet".into(),
            option_roms: roms(directory.path()),
        }),
        ..FirmwareConfig::default()
    };
    let firmware = prepare(&Ram::new(64 << 20).unwrap(), &config).unwrap();
    let number = |number: u16| number_of(&firmware, number);
    let u32_at = |bytes: &[u8], at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().unwrap());
    assert_eq!(number(key::KERNEL_ENTRY), 0x11_0028u32.to_le_bytes());
    assert_eq!(number(key::KERNEL_ADDRESS), 0x11_0000u32.to_le_bytes());
    let content = number(key::KERNEL_DATA);
    assert_eq!(number(key::KERNEL_SIZE), (content.len() as u32).to_le_bytes());
    assert_eq!(content[..100], multiboot_kernel());
    assert_eq!(content[100..4196], [0; 4096]);
    let at = |address: u32| &content[(address - 0x11_0000) as usize..];
    let text = |address: u32| at(address).split(|&byte| byte == 0).next().unwrap().to_vec();
    let information = number(key::INITRD_DATA);
    assert_eq!(u32_at(&information, 0), 0x24f);
    assert_eq!(text(u32_at(&information, 16)), format!("{} quiet", kernel.display()).into_bytes());
    assert_eq!(u32_at(&information, 20), 1);
    let list = at(u32_at(&information, 24));
    assert_eq!((u32_at(list, 0), u32_at(list, 4)), (0x11_2000, 0x11_2006));
    assert_eq!(at(0x11_2000)[..6], *b"module");
    assert_eq!(text(u32_at(list, 8)), module.display().to_string().into_bytes());
    // The ROM writes memory's sizes and map.
    let address = u32_at(&number(key::INITRD_ADDRESS), 0);
    assert!(address.is_multiple_of(16) && address >= u32_at(&information, 48) + 0x500);
    assert_eq!(self::text(&firmware, "genroms/multiboot_dma.bin").unwrap().len(), 1024);
    assert_eq!(self::text(&firmware, "bootorder").unwrap(), b"/rom@genroms/multiboot_dma.bin\0");
}

#[test]
fn what_an_option_rom_can_not_load_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let mut second = multiboot_kernel();
    let words = [0xe852_50d6, 0, 16, 0u32.wrapping_sub(0xe852_50d6 + 16)];
    second.get_mut(8..24).unwrap().copy_from_slice(&words.map(u32::to_le_bytes).concat());
    let with = |content: Vec<u8>, option_roms| FirmwareConfig {
        image: bios(directory.path(), 0x2_0000),
        kernel: Some(Kernel {
            image: write(directory.path(), "kernel", content),
            initrd: Vec::new(),
            command_line: String::new(),
            option_roms,
        }),
        ..FirmwareConfig::default()
    };
    assert!(why(&with(second, roms(directory.path()))).contains("Multiboot 1 only"));
    assert!(why(&with(vec![1; 100], roms(directory.path()))).contains("is not a kernel"));
    assert!(why(&with(multiboot_kernel(), OptionRoms::default())).contains("is not a kernel"));
}

#[test]
fn a_kernel_is_handed_over_with_its_header_filled_in() {
    let directory = tempfile::tempdir().unwrap();
    let mut kernel = vec![0; 0x3000];
    kernel[0x1f1] = 3;
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    kernel[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    kernel[0x211] = 1;
    kernel[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    let path = write(directory.path(), "vmlinuz", kernel);
    let ram = Ram::new(64 << 20).unwrap();
    let kernel = Kernel {
        image: path,
        initrd: vec![write(directory.path(), "initrd", vec![1; 5000])],
        command_line: "quiet".into(),
        option_roms: roms(directory.path()),
    };
    let config = FirmwareConfig {
        image: bios(directory.path(), 0x2_0000),
        cpus: Topology::of_cores(1),
        kernel: Some(kernel),
        ..FirmwareConfig::default()
    };
    let firmware = prepare(&ram, &config).unwrap();
    let number = |number| number_of(&firmware, number);
    assert_eq!(number(key::SETUP_SIZE), 2048u32.to_le_bytes());
    assert_eq!(number(key::KERNEL_DATA), (0x3000u64 - 2048).to_le_bytes());
    assert_eq!(number(key::COMMAND_LINE_DATA), b"quiet\0");
    let setup = number(key::SETUP_DATA);
    let address = ((64 << 20) - (256 << 10) - 5000u32) / 4096 * 4096;
    assert_eq!(setup[0x218..0x21c], address.to_le_bytes());
    assert_eq!(setup[0x21c..0x220], 5000u32.to_le_bytes());
    assert_eq!((setup[0x210], setup[0x211]), (0xb0, 0x81));
    assert_eq!(text(&firmware, "bootorder").unwrap(), b"/rom@genroms/linuxboot_dma.bin\0");
    assert_eq!(text(&firmware, "genroms/linuxboot_dma.bin").unwrap().len(), 512);
}
