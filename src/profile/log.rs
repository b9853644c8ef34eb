//! Access logs: which units each shard asked for, step by step. Enough to size a cache without the keys and values.
//!
//! A text file, one record a line, fields between single spaces:
//!
//! ```text
//! floe-access-log 1             first line: format and version
//! unit row 512                  row or page, bytes of one unit
//! budget 256                    tokens attended exactly per kv head and step, sinks and window included
//! shard 0 14 1                  shard number (0, 1, ... in order), layer, kv head
//! step 30210                    position of the step; positions ascend
//! use 0 17:0.25 18:0.1          shard, then unit:attention mass (0 to 1), units ascending
//! guess 0 17 20                 shard, then what a search with the previous layer's query finds (optional)
//! end 95                        last line: number of steps, so that a cut file is noticed
//! ```
//! Sinks and window are not in it: they are resident in every design. A shard without a `use` line asks for nothing in
//! that step. Lines that start with `#` are comments.

use std::io::{self, BufRead, Write};
use std::str::FromStr;

use crate::page::Unit;

const FORMAT: &str = "floe-access-log";
const VERSION: &str = "1";

/// One shard of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ShardName {
    /// Layer of the model.
    pub layer: usize,
    /// kv head of the layer.
    pub kv_head: usize,
}

/// What one shard asks for in one step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Access {
    /// Retrieved units, ascending.
    pub units: Vec<u32>,
    /// Attention mass of each, mean over the group's query heads.
    pub mass: Vec<f32>,
    /// Units that a search with the previous layer's query finds, ascending; empty when nobody asked.
    pub guess: Vec<u32>,
}

/// The access string of one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct AccessLog {
    /// Unit of residency and transfer.
    pub unit: Unit,
    /// Bytes of one unit.
    pub unit_bytes: usize,
    /// Tokens attended exactly per kv head and step, sinks and window included.
    pub budget: usize,
    /// Shards, in order of layer and head.
    pub shards: Vec<ShardName>,
    /// Position of each step, ascending.
    pub positions: Vec<u64>,
    /// `[steps, shards]`
    pub accesses: Vec<Vec<Access>>,
}

/// What can be wrong with an access log.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// The operating system refused to read or write.
    #[error("access log: cannot {action}")]
    Io {
        /// "read" or "write".
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// A line that the format does not allow.
    #[error("access log, line {line}: field `{field}`: {reason}")]
    Line {
        /// Line number, from 1.
        line: usize,
        /// Field of the format.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The file ends before its `end` line.
    #[error("access log: truncated: no `end` line after {lines} lines")]
    Truncated {
        /// Lines read.
        lines: usize,
    },
}

impl LogError {
    /// Whether the machine is at fault rather than the file.
    #[must_use]
    pub fn is_environment(&self) -> bool {
        matches!(self, Self::Io { .. })
    }
}

impl AccessLog {
    /// Writes the log as text.
    ///
    /// # Errors
    /// [`LogError::Io`].
    pub fn write(&self, out: &mut dyn Write) -> Result<(), LogError> {
        self.write_lines(out).map_err(|source| LogError::Io { action: "write", source })
    }

    fn write_lines(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{FORMAT} {VERSION}\nunit {} {}", self.unit.name(), self.unit_bytes)?;
        writeln!(out, "budget {}", self.budget)?;
        for (i, shard) in self.shards.iter().enumerate() {
            writeln!(out, "shard {i} {} {}", shard.layer, shard.kv_head)?;
        }
        for (position, step) in self.positions.iter().zip(&self.accesses) {
            writeln!(out, "step {position}")?;
            for (i, access) in step.iter().enumerate() {
                if !access.units.is_empty() {
                    write!(out, "use {i}")?;
                    access.units.iter().zip(&access.mass).try_for_each(|(u, m)| write!(out, " {u}:{m}"))?;
                    writeln!(out)?;
                }
                if !access.guess.is_empty() {
                    write!(out, "guess {i}")?;
                    access.guess.iter().try_for_each(|unit| write!(out, " {unit}"))?;
                    writeln!(out)?;
                }
            }
        }
        writeln!(out, "end {}", self.accesses.len())
    }

    /// Reads a log.
    ///
    /// # Errors
    /// [`LogError`] naming line and field.
    pub fn read(input: &mut dyn BufRead) -> Result<Self, LogError> {
        let mut reader = Reader::default();
        let mut text = String::new();
        loop {
            text.clear();
            let bytes =
                input.read_line(&mut text).map_err(|source| LogError::Io { action: "read", source })?;
            if bytes == 0 {
                return Err(LogError::Truncated { lines: reader.line });
            }
            reader.line += 1;
            if !text.ends_with('\n') {
                return Err(LogError::Truncated { lines: reader.line });
            }
            let content = text.trim_end_matches(['\n', '\r']);
            if content.is_empty() || content.starts_with('#') {
                continue;
            }
            if reader.accept(content)? {
                return Ok(reader.log);
            }
        }
    }
}

struct Reader {
    line: usize,
    /// Records seen of format, unit, budget.
    head: usize,
    log: AccessLog,
}

impl Default for Reader {
    fn default() -> Self {
        let log = AccessLog {
            unit: Unit::Row,
            unit_bytes: 0,
            budget: 0,
            shards: Vec::new(),
            positions: Vec::new(),
            accesses: Vec::new(),
        };
        Self { line: 0, head: 0, log }
    }
}

impl Reader {
    fn refuse(&self, field: &'static str, reason: impl Into<String>) -> LogError {
        LogError::Line { line: self.line, field, reason: reason.into() }
    }

    fn number<T: FromStr>(&self, field: &'static str, text: Option<&str>) -> Result<T, LogError> {
        let text = text.ok_or_else(|| self.refuse(field, "missing"))?;
        text.parse().map_err(|_| self.refuse(field, format!("{text:?} is not a number in range")))
    }

    /// Takes one line; true when it was the last.
    fn accept(&mut self, content: &str) -> Result<bool, LogError> {
        let mut fields = content.split(' ');
        let keyword = fields.next().unwrap_or_default();
        if self.head < 3 {
            return self.accept_head(keyword, fields).map(|()| false);
        }
        match keyword {
            "shard" => {
                let number: usize = self.number("shard", fields.next())?;
                if number != self.log.shards.len() || !self.log.positions.is_empty() {
                    return Err(
                        self.refuse("shard", format!("{number}: shards count up from 0 before the steps"))
                    );
                }
                let layer = self.number("layer", fields.next())?;
                let kv_head = self.number("kv_head", fields.next())?;
                self.log.shards.push(ShardName { layer, kv_head });
            }
            "step" => {
                let position: u64 = self.number("step", fields.next())?;
                if self.log.positions.last().is_some_and(|last| *last >= position) {
                    return Err(self.refuse("step", format!("{position}: positions ascend")));
                }
                if self.log.shards.is_empty() {
                    return Err(self.refuse("step", "no shard is declared"));
                }
                self.log.positions.push(position);
                self.log.accesses.push(vec![Access::default(); self.log.shards.len()]);
            }
            "use" => return self.accept_use(fields).map(|()| false),
            "guess" => return self.accept_guess(fields).map(|()| false),
            "end" => {
                let steps: usize = self.number("end", fields.next())?;
                if steps != self.log.accesses.len() {
                    let found = self.log.accesses.len();
                    return Err(self.refuse("end", format!("{steps} steps promised, {found} present")));
                }
            }
            other => return Err(self.refuse("keyword", format!("{other:?} is unknown"))),
        }
        match fields.next() {
            Some(extra) => Err(self.refuse("keyword", format!("{extra:?} follows the last field"))),
            None => Ok(keyword == "end"),
        }
    }

    fn accept_head<'a>(
        &mut self,
        keyword: &str,
        mut fields: impl Iterator<Item = &'a str>,
    ) -> Result<(), LogError> {
        match (self.head, keyword) {
            (0, FORMAT) => match fields.next() {
                Some(VERSION) => {}
                other => {
                    let found = other.unwrap_or("none").to_owned();
                    return Err(self.refuse("version", format!("{found:?}; this program reads {VERSION}")));
                }
            },
            (1, "unit") => {
                let name = fields.next().unwrap_or_default();
                self.log.unit = name.parse().map_err(|reason| self.refuse("unit", reason))?;
                self.log.unit_bytes = self.number("unit_bytes", fields.next())?;
            }
            (2, "budget") => self.log.budget = self.number("budget", fields.next())?,
            (0, _) => return Err(self.refuse("format", "this is no access log")),
            (_, other) => {
                let expected = ["unit", "budget"][self.head - 1];
                return Err(self.refuse("keyword", format!("{other:?} where `{expected}` belongs")));
            }
        }
        self.head += 1;
        Ok(())
    }

    fn shard_of<'a>(&self, fields: &mut impl Iterator<Item = &'a str>) -> Result<usize, LogError> {
        let shard: usize = self.number("shard", fields.next())?;
        if shard >= self.log.shards.len() || self.log.accesses.is_empty() {
            return Err(self.refuse("shard", format!("{shard}: not declared, or before the first step")));
        }
        Ok(shard)
    }

    fn accept_use<'a>(&mut self, mut fields: impl Iterator<Item = &'a str>) -> Result<(), LogError> {
        let shard = self.shard_of(&mut fields)?;
        let (mut units, mut mass) = (Vec::new(), Vec::new());
        for field in fields {
            let (unit, share) =
                field.split_once(':').ok_or_else(|| self.refuse("use", "unit:mass expected"))?;
            units.push(self.number("unit", Some(unit))?);
            let share: f32 = self.number("mass", Some(share))?;
            if !(0.0..=1.0).contains(&share) {
                return Err(self.refuse("mass", format!("{share} is not within 0 to 1")));
            }
            mass.push(share);
        }
        self.check_units(&units)?;
        if let Some(access) = self.log.accesses.last_mut() {
            (access[shard].units, access[shard].mass) = (units, mass);
        }
        Ok(())
    }

    fn accept_guess<'a>(&mut self, mut fields: impl Iterator<Item = &'a str>) -> Result<(), LogError> {
        let shard = self.shard_of(&mut fields)?;
        let units = fields.map(|unit| self.number("guess", Some(unit))).collect::<Result<Vec<u32>, _>>()?;
        self.check_units(&units)?;
        if let Some(access) = self.log.accesses.last_mut() {
            access[shard].guess = units;
        }
        Ok(())
    }

    fn check_units(&self, units: &[u32]) -> Result<(), LogError> {
        if units.is_sorted_by(|a, b| a < b) {
            return Ok(());
        }
        Err(self.refuse("unit", "units must ascend without repetition"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> AccessLog {
        let access = |units: &[u32]| Access {
            units: units.to_vec(),
            mass: units.iter().map(|u| 1.0 / (*u as f32 + 2.0)).collect(),
            guess: units.iter().map(|u| u + 1).collect(),
        };
        AccessLog {
            unit: Unit::Row,
            unit_bytes: 512,
            budget: 256,
            shards: vec![ShardName { layer: 3, kv_head: 0 }, ShardName { layer: 5, kv_head: 1 }],
            positions: vec![100, 101],
            accesses: vec![vec![access(&[1, 2, 9]), access(&[])], vec![access(&[2]), access(&[0, 7])]],
        }
    }

    fn text(log: &AccessLog) -> Vec<u8> {
        let mut bytes = Vec::new();
        log.write(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_log_reads_back_as_written() {
        let log = sample();
        assert_eq!(AccessLog::read(&mut &text(&log)[..]).unwrap(), log);
    }

    #[test]
    fn a_log_cut_anywhere_is_refused() {
        let bytes = text(&sample());
        for end in 0..bytes.len() {
            assert!(AccessLog::read(&mut &bytes[..end]).is_err(), "{end}");
        }
    }

    #[test]
    fn errors_name_line_and_field() {
        let good = String::from_utf8(text(&sample())).unwrap();
        for (from, to, words) in [
            ("floe-access-log 1", "floe-access-log 2", ["line 1", "version"]),
            ("unit row", "unit column", ["line 2", "column"]),
            ("budget 256", "budget many", ["line 3", "many"]),
            ("shard 1 5", "shard 2 5", ["line 5", "`shard`"]),
            ("step 101", "step 100", ["line 9", "ascend"]),
            ("1:0.33333334", "1:7", ["line 7", "`mass`"]),
            ("use 0 1:", "use 9 1:", ["line 7", "`shard`"]),
            ("end 2", "end 3", ["line 14", "`end`"]),
            ("end 2", "stop 2", ["line 14", "stop"]),
        ] {
            assert!(good.contains(from), "{from}\n{good}");
            let bad = good.replacen(from, to, 1);
            let message = AccessLog::read(&mut bad.as_bytes()).unwrap_err().to_string();
            assert!(words.iter().all(|w| message.contains(w)), "{to}: {message}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut text = b"floe-access-log 1\nunit row 4\nbudget 1\nshard 0 0 0\n".to_vec();
            text.extend(bytes);
            let _ = AccessLog::read(&mut &text[..]);
        }
    }
}
