//! What a command of the bench ends with: tables in Markdown for people, and CSV for everything
//! else.

use std::fmt;

use crate::samples::{Key, Samples};

/// The findings, ready to be printed and kept.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) text: String,
    pub(crate) csv: String,
    /// Whether every run ended well, with a result equal to its source.
    pub(crate) valid: bool,
}

impl Report {
    /// What machine it was, the tables, and what else is to be known.
    pub(crate) fn new<K: Key>(machine: &[String], tables: &[Table], samples: &Samples<K>) -> Self {
        let list = |lines: &[String]| lines.iter().map(|line| format!("- {line}\n")).collect();
        let mut parts: Vec<String> = vec![list(machine)];
        parts.extend(tables.iter().map(ToString::to_string));
        parts.push(list(&samples.notes()));
        Self {
            text: parts.join("\n"),
            csv: samples.csv(),
            valid: samples.all_valid(),
        }
    }
}

/// A table whose first columns are words, and whose others are numbers, under a sentence that says
/// what was measured.
#[derive(Debug)]
pub(crate) struct Table {
    caption: String,
    words: Vec<&'static str>,
    numbers: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(caption: String, words: &[&'static str], numbers: &[&'static str]) -> Self {
        Self {
            caption,
            words: words.to_vec(),
            numbers: numbers.to_vec(),
            rows: Vec::new(),
        }
    }

    pub(crate) fn push(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = [&self.words[..], &self.numbers[..]].concat();
        let words = self.words.iter().map(|_| "---");
        let rule: Vec<_> = words.chain(self.numbers.iter().map(|_| "---:")).collect();
        writeln!(f, "{}\n", self.caption)?;
        writeln!(f, "| {} |\n| {} |", head.join(" | "), rule.join(" | "))?;
        for row in &self.rows {
            writeln!(f, "| {} |", row.join(" | "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stand_left_and_numbers_right() {
        let mut table = Table::new("Speed.".to_owned(), &["tool"], &["wall s", "CPU s"]);
        table.push(["rsync", "1.00", "–"].map(str::to_owned).to_vec());
        assert_eq!(
            table.to_string(),
            "Speed.\n\n| tool | wall s | CPU s |\n| --- | ---: | ---: |\n| rsync | 1.00 | – |\n"
        );
    }
}
