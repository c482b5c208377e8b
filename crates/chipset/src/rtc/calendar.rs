//! Seconds since 1970 to a date of the Gregorian calendar, and back.

pub const SECONDS_PER_DAY: i64 = 86_400;

/// A date and a time of day, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    pub year: i64,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    pub hour: u8,
    pub minute: u8,
    pub second: u8,
}

impl Moment {
    pub fn from_seconds(seconds: i64) -> Self {
        let time = seconds.rem_euclid(SECONDS_PER_DAY);
        let days = seconds.div_euclid(SECONDS_PER_DAY);
        // The mean year has 365.2425 days; that guess is a year off at most.
        let mut year = 1970 + (days * 400).div_euclid(146_097);
        if days < days_before_year(year) {
            year -= 1;
        } else if days >= days_before_year(year + 1) {
            year += 1;
        }
        let mut day = days - days_before_year(year);
        let mut month = 1;
        while day >= days_in_month(year, month) {
            day -= days_in_month(year, month);
            month += 1;
        }
        Moment {
            year,
            month,
            day: day as u8 + 1,
            hour: (time / 3600) as u8,
            minute: (time / 60 % 60) as u8,
            second: (time % 60) as u8,
        }
    }

    /// A day past the end of its month counts into the next one, and likewise for the time.
    pub fn to_seconds(self) -> i64 {
        let month = self.month.clamp(1, 12);
        let days = days_before_year(self.year)
            + (1..month).map(|month| days_in_month(self.year, month)).sum::<i64>()
            + i64::from(self.day)
            - 1;
        days * SECONDS_PER_DAY + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }

    /// 1 is Sunday.
    pub fn weekday(self) -> u8 {
        let days = self.to_seconds().div_euclid(SECONDS_PER_DAY);
        // 1970 began on a Thursday.
        (days + 4).rem_euclid(7) as u8 + 1
    }
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_in_month(year: i64, month: u8) -> i64 {
    match month {
        2 => 28 + i64::from(is_leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 to January 1 of `year`.
fn days_before_year(year: i64) -> i64 {
    let leap_days = |year: i64| (year - 1).div_euclid(4) - (year - 1).div_euclid(100) + (year - 1).div_euclid(400);
    (year - 1970) * 365 + leap_days(year) - leap_days(1970)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> (i64, u8, u8, u8, u8, u8, u8) {
        let m = Moment::from_seconds(seconds);
        (m.year, m.month, m.day, m.hour, m.minute, m.second, m.weekday())
    }

    #[test]
    fn well_known_moments() {
        assert_eq!(at(0), (1970, 1, 1, 0, 0, 0, 5));
        assert_eq!(at(951_782_400), (2000, 2, 29, 0, 0, 0, 3));
        assert_eq!(at(1_709_164_798), (2024, 2, 28, 23, 59, 58, 4));
        assert_eq!(at(4_107_542_399), (2100, 2, 28, 23, 59, 59, 1));
        assert_eq!(at(4_107_542_400), (2100, 3, 1, 0, 0, 0, 2));
    }

    #[test]
    fn every_day_of_the_calendar_comes_back() {
        for day in (-720_000..2_930_000).step_by(13) {
            let seconds = day * SECONDS_PER_DAY + day.rem_euclid(SECONDS_PER_DAY);
            assert_eq!(Moment::from_seconds(seconds).to_seconds(), seconds);
        }
    }
}
