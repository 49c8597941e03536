//! Hours of the week in which another rate holds: work hours, nights, weekends.
//!
//! Written as `DAYS FROM-TO RATE`, for example `mon-fri 08:00-18:00 50 Mbit/s`. The first one that fits counts; where none
//! does, the usual rate. Times are of the machine's own clock, with its time zone and summer time. What ends at or before
//! its beginning goes on into the next day, and belongs to the day it begins on.
//!
//! Invariant: every minute of the week has one rate. Units: days from Monday, minutes of the day. Used by the configurations
//! and, once a second or so, by the daemons.

use std::fmt;
use std::str::FromStr;

use crate::host::config_doc::KeyDoc;
use crate::host::values::{Rate, ValueError};

const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
const MINUTES: u16 = 24 * 60;
const REMEDY: &str = "write days, hours and a rate, such as \"mon-fri 08:00-18:00 50 Mbit/s\" or \"sat,sun 00:00-24:00 unlimited\"";

/// A minute of the week, by the machine's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Minute {
    /// Days since Monday.
    pub day: u8,
    /// Minutes since midnight.
    pub minute: u16,
}

impl Minute {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        let now = jiff::Zoned::now();
        let day = now.weekday().to_monday_zero_offset().unsigned_abs();
        let minute = u16::from(now.hour().unsigned_abs()) * 60 + u16::from(now.minute().unsigned_abs());
        Self { day, minute }
    }
}

/// Hours and the rate in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateHours {
    days: [bool; 7],
    from: u16,
    /// Up to this minute; 1440 is midnight at the end.
    to: u16,
    rate: Rate,
}

impl RateHours {
    fn has(&self, now: Minute) -> bool {
        let on = |day: u8| self.days.get(usize::from(day % 7)).copied().unwrap_or(false);
        if self.from < self.to {
            return on(now.day) && (self.from..self.to).contains(&now.minute);
        }
        (on(now.day) && now.minute >= self.from) || (on(now.day + 6) && now.minute < self.to)
    }
}

/// A rate by the hour.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HourlyRate {
    /// Where none of the hours fits.
    pub usual: Rate,
    /// The first that fits counts.
    pub hours: Vec<RateHours>,
}

impl HourlyRate {
    fn at(&self, now: Minute) -> Rate {
        self.hours.iter().find(|hours| hours.has(now)).map_or(self.usual, |hours| hours.rate)
    }

    /// What holds now, in bytes per second; `None` for no limit.
    #[must_use]
    pub fn now(&self) -> Option<u64> {
        // The clock is not asked where it does not matter.
        let rate = if self.hours.is_empty() { self.usual } else { self.at(Minute::now()) };
        rate.bytes_per_second()
    }
}

/// The key of hours of sending, which all programs that send have.
pub const SEND_HOURS_KEY: KeyDoc = KeyDoc {
    key: "send_hours",
    about: "Hours of the week in which another `send_rate` holds; the first that fits counts. By this machine's clock and time zone.",
    unit: "list of \"DAYS FROM-TO RATE\", such as \"mon-fri 08:00-18:00 50 Mbit/s\"",
    cost: "none",
    example: "",
};

fn refuse<T>(what: String) -> Result<T, ValueError> {
    Err(ValueError { what, remedy: REMEDY.to_owned() })
}

fn day(text: &str) -> Option<usize> {
    DAYS.iter().position(|day| text.eq_ignore_ascii_case(day))
}

fn days(text: &str) -> Option<[bool; 7]> {
    let mut days = [false; 7];
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (day(first)?, day(last)?);
        // From Friday to Monday goes over the end of the week.
        let count = (last + 7 - first) % 7;
        for number in first..=first + count {
            *days.get_mut(number % 7)? = true;
        }
    }
    Some(days)
}

fn minute(text: &str) -> Option<u16> {
    let (hours, minutes) = text.split_once(':')?;
    let is_number = |text: &str| text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(hours) || !is_number(minutes) {
        return None;
    }
    let (hours, minutes): (u16, u16) = (hours.parse().ok()?, minutes.parse().ok()?);
    let minute = hours * 60 + minutes;
    (minutes < 60 && minute <= MINUTES).then_some(minute)
}

impl FromStr for RateHours {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let text = text.trim();
        let parts = text.split_once(char::is_whitespace).and_then(|(on, rest)| {
            let (hours, rate) = rest.trim_start().split_once(char::is_whitespace)?;
            Some((on, hours, rate.trim_start()))
        });
        let Some((on, hours, rate)) = parts else {
            return refuse(format!("\"{text}\" has no days, hours and rate"));
        };
        let Some(days) = days(on) else { return refuse(format!("\"{on}\" names no days")) };
        let span = hours.split_once('-').and_then(|(from, to)| Some((minute(from)?, minute(to)?)));
        match span {
            Some((from, to)) if from < MINUTES && to > 0 && from != to => {
                Ok(Self { days, from, to, rate: rate.parse()? })
            }
            _ => refuse(format!("\"{hours}\" are no hours")),
        }
    }
}

impl fmt::Display for RateHours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = DAYS.iter().zip(self.days).filter(|(_, on)| *on).map(|(day, _)| *day);
        let time = |minute: u16| format!("{:02}:{:02}", minute / 60, minute % 60);
        let days = named.collect::<Vec<_>>().join(",");
        write!(f, "{days} {}-{} {}", time(self.from), time(self.to), self.rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USUAL: Rate = Rate::UNLIMITED;

    fn hours(text: &str) -> RateHours {
        text.parse().unwrap()
    }

    fn at(day: u8, time: &str) -> Minute {
        Minute { day, minute: minute(time).unwrap() }
    }

    #[test]
    fn the_first_that_fits_counts_and_elsewhere_the_usual_rate() {
        let (work, noon) = ("mon-fri 08:00-18:00 10 MB/s", "wed 12:00-13:00 unlimited");
        let ten = Rate(Some(10_000_000));
        let rates = HourlyRate { usual: USUAL, hours: vec![hours(noon), hours(work)] };
        for (day, time, rate) in [
            (0, "07:59", USUAL),
            (0, "08:00", ten),
            (4, "17:59", ten),
            (4, "18:00", USUAL),
            (5, "12:00", USUAL),
            (2, "12:30", USUAL),
            (2, "13:00", ten),
        ] {
            assert_eq!(rates.at(at(day, time)), rate, "{day} {time}");
        }
        assert_eq!(HourlyRate { usual: ten, hours: Vec::new() }.at(at(0, "00:00")), ten);
    }

    #[test]
    fn nights_belong_to_the_day_they_begin_on_and_days_go_over_the_end_of_the_week() {
        let night = HourlyRate { usual: USUAL, hours: vec![hours("sun 22:00-06:00 1 MB/s")] };
        let slow = Rate(Some(1_000_000));
        for (day, time, rate) in [
            (6, "21:59", USUAL),
            (6, "22:00", slow),
            (0, "05:59", slow),
            (0, "06:00", USUAL),
            (6, "05:00", USUAL),
        ] {
            assert_eq!(night.at(at(day, time)), rate, "{day} {time}");
        }
        let weekend = hours("fri-mon 00:00-24:00 1 MB/s");
        assert_eq!(weekend.days, [true, false, false, false, true, true, true]);
        assert!((0..1440).all(|minute| weekend.has(Minute { day: 5, minute })));
    }

    #[test]
    fn what_is_written_is_read_again_and_what_is_wrong_is_named() {
        for text in [
            "mon,tue 08:00-18:30 50 Mbit/s",
            "sun 22:00-06:00 unlimited",
            "mon,tue,wed,thu,fri,sat,sun 00:00-24:00 1 B/s",
        ] {
            assert_eq!(hours(text).to_string().parse(), Ok(hours(text)), "{text}");
        }
        assert_eq!(hours("Mon-Tue  08:00-18:30   50 Mbit/s"), hours("mon,tue 08:00-18:30 50 Mbit/s"));
        for (text, named) in [
            ("", "no days, hours and rate"),
            ("mon 08:00-18:00", "no days, hours and rate"),
            ("monday 08:00-18:00 1 MB/s", "\"monday\" names no days"),
            ("mon-fri 8:00-18:00 1 MB/s", "\"8:00-18:00\" are no hours"),
            ("mon 08:00-08:00 1 MB/s", "are no hours"),
            ("mon 24:00-08:00 1 MB/s", "are no hours"),
            ("mon 08:00-00:00 1 MB/s", "are no hours"),
            ("mon 08:60-09:00 1 MB/s", "are no hours"),
            ("mon 08:00-18:00 fast", "is not a rate"),
            ("mon 08:00-18:00 0 MB/s", "would stop everything"),
        ] {
            let error = text.parse::<RateHours>().unwrap_err();
            assert!(error.what.contains(named), "{text}: {}", error.what);
        }
    }

    #[test]
    fn now_is_a_minute_of_the_week() {
        let now = Minute::now();
        assert!(now.day < 7 && now.minute < MINUTES);
    }
}
