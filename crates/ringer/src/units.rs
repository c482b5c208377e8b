//! Sizes as users write them: `512M`, `2G`, `1.5G` is not one.

/// Parses a size in bytes. Units are powers of 1024: K, M, G, T, each also as `KB` or `KiB`, in either case. A number
/// alone is in MiB, as other monitors have it.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong(text))?;
    let unit = unit.to_ascii_uppercase();
    let shift = match unit.strip_suffix("IB").or(unit.strip_suffix('B')).unwrap_or(&unit) {
        "K" => 10,
        "M" => 20,
        "" if unit.is_empty() => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(wrong(text)),
    };
    number.checked_mul(1 << shift).ok_or_else(|| wrong(text))
}

fn wrong(text: &str) -> String {
    format!("\"{text}\" is not a size: write a whole number and K, M or G, like 512M or 2G")
}

/// A size in the largest unit that divides it.
pub fn show_size(size: u64) -> String {
    let (shift, unit) = match size {
        _ if size.is_multiple_of(1 << 30) => (30, "G"),
        _ if size.is_multiple_of(1 << 20) => (20, "M"),
        _ if size.is_multiple_of(1 << 10) => (10, "K"),
        _ => (0, " bytes"),
    };
    format!("{}{unit}", size >> shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_1024() {
        let cases = [("512M", 512 << 20), ("2g", 2 << 30), ("64KiB", 64 << 10), ("1TB", 1 << 40), ("256", 256 << 20)];
        for (text, size) in cases {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_an_example() {
        for text in ["", "M", "12Q", "-1M", "1.5G", "512 M", "99999999999999999999", "99999999999G", "5B", "5iB"] {
            assert!(parse_size(text).is_err_and(|e| e.contains("512M")), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_in_their_largest_unit() {
        assert_eq!(show_size(512 << 20), "512M");
        assert_eq!(show_size(3 << 30), "3G");
        assert_eq!(show_size(4097), "4097 bytes");
    }
}
