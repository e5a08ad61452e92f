//! `config init`, `config show`, `config set` and `config unset`.

use clap::Subcommand;
use serde::Serialize;
use serde_json::{Map, Value};

use super::options::OutputFormat;
use crate::config::{ConfigFile, KEYS};
use crate::error::Result;
use crate::output;

/// What can be done with the configuration file.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Write a commented file; refuses to overwrite one
    Init,
    /// Print every key and what holds for it
    Show,
    /// Set a key; comments in the file stay
    Set {
        /// Key, such as: route
        key: String,
        /// Value; ssh-options takes several
        #[arg(required = true)]
        value: Vec<String>,
    },
    /// Take a key out of the file
    Unset {
        /// Key, such as: route
        key: String,
    },
}

#[derive(Debug, Serialize)]
struct Shown {
    file: String,
    /// What holds, from the file or by default.
    values: Map<String, Value>,
    /// The keys that the file sets.
    set: Vec<&'static str>,
}

pub(super) fn run(command: &Command, file: &ConfigFile, format: OutputFormat) -> Result<()> {
    match command {
        Command::Init => {
            file.init()?;
            output::to_stderr(&format!("wrote {}\n", file.path().display()));
            Ok(())
        }
        Command::Show => show(file, format),
        Command::Set { key, value } => file.set(key, value),
        Command::Unset { key } => file.unset(key),
    }
}

fn show(file: &ConfigFile, format: OutputFormat) -> Result<()> {
    let mut shown = Shown {
        file: file.path().display().to_string(),
        values: Map::new(),
        set: Vec::new(),
    };
    for (key, (name, value)) in KEYS.iter().zip(file.values()?) {
        if value.is_some() {
            shown.set.push(name);
        }
        let default = || key.default.map_or(Value::Null, Value::from);
        shown
            .values
            .insert(name.to_owned(), value.unwrap_or_else(default));
    }
    output::print(&shown, format, || text(&shown))
}

fn text(shown: &Shown) -> String {
    let mut table = output::table(&["KEY", "VALUE", "FROM"]);
    for key in KEYS {
        let value = match &shown.values[key.name] {
            Value::Null => "-".to_owned(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let from = if shown.set.contains(&key.name) {
            shown.file.as_str()
        } else {
            "default"
        };
        table.add_row([key.name, &value, from]);
    }
    output::table_text(&table)
}
