//! The configuration file: defaults for options of the command line, one TOML file, no layers.
//! A key that is not known is an error, and every error names the file and the line.

use std::fmt::Display;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use toml_edit::DocumentMut;

use crate::cli::options::{ApplyArg, CompressChoice, HashChoice, Rate, TimeLimit};
use crate::error::{Error, ErrorCode, Result};
use crate::transfer::{MethodChoice, RouteChoice};

/// What `config init` writes: every key, with what holds without it.
const TEMPLATE: &str = "\
# Defaults for kvm-clone-ctl. An option on the command line wins over this file.

# How disks are transferred: \"rsync\", \"libvirt\", \"blocksync\" or \"auto\". Without it, whole VMs
# by rsync, and single disks by blocksync.
#method = \"blocksync\"

# How the agents reach each other: \"auto\", \"direct\" or \"relay\".
#route = \"auto\"

# Compression on the wire: \"auto\", \"off\", or a level from 1 to 19.
#compress = \"auto\"

# At most so many bytes a second, such as \"100M\".
#bandwidth-limit = \"100M\"

# How blocks are compared: \"xxh3\" or \"blake3\".
#hash = \"xxh3\"

# How a destination that exists is changed: \"auto\", \"staged\", \"reflink\" or \"inplace\".
#apply = \"auto\"

# Give up after so long, such as \"2h\".
#timeout = \"2h\"

# What ssh is given as -F, -i and -o.
#ssh-config = \"/home/me/.ssh/config\"
#ssh-key = \"/home/me/.ssh/id_ed25519\"
#ssh-options = [\"ConnectTimeout=5\"]

# Where libvirt listens on the hosts.
#connect = \"qemu:///system\"
";

/// What the file says. `None`, or empty: nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
#[expect(missing_docs, reason = "each field is the option of the same name")]
pub struct Config {
    #[serde(deserialize_with = "parsed")]
    pub method: Option<MethodChoice>,
    #[serde(deserialize_with = "parsed")]
    pub route: Option<RouteChoice>,
    #[serde(deserialize_with = "parsed")]
    pub compress: Option<CompressChoice>,
    #[serde(deserialize_with = "parsed")]
    pub bandwidth_limit: Option<Rate>,
    #[serde(deserialize_with = "parsed")]
    pub hash: Option<HashChoice>,
    #[serde(deserialize_with = "parsed")]
    pub apply: Option<ApplyArg>,
    #[serde(deserialize_with = "parsed")]
    pub timeout: Option<TimeLimit>,
    pub ssh_config: Option<PathBuf>,
    pub ssh_key: Option<PathBuf>,
    pub ssh_options: Vec<String>,
    pub connect: Option<String>,
}

/// A key, and what holds where the file does not set it.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// As it is written.
    pub name: &'static str,
    /// Nothing: there is no default.
    pub default: Option<&'static str>,
}

/// Every key, in the order of the template.
pub const KEYS: [Key; 11] = [
    Key {
        name: "method",
        default: None,
    },
    Key {
        name: "route",
        default: Some("auto"),
    },
    Key {
        name: "compress",
        default: Some("auto"),
    },
    Key {
        name: "bandwidth-limit",
        default: None,
    },
    Key {
        name: "hash",
        default: Some("xxh3"),
    },
    Key {
        name: "apply",
        default: Some("auto"),
    },
    Key {
        name: "timeout",
        default: None,
    },
    Key {
        name: "ssh-config",
        default: None,
    },
    Key {
        name: "ssh-key",
        default: None,
    },
    Key {
        name: "ssh-options",
        default: None,
    },
    Key {
        name: "connect",
        default: Some("qemu:///system"),
    },
];

/// A level or a rate may be written as a number.
#[derive(Deserialize)]
#[serde(untagged)]
enum Scalar {
    Text(String),
    Number(i64),
}

/// A value by the parser of the command line.
fn parsed<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: Display>,
{
    let text = match Scalar::deserialize(deserializer)? {
        Scalar::Text(text) => text,
        Scalar::Number(number) => number.to_string(),
    };
    text.parse().map(Some).map_err(D::Error::custom)
}

/// The configuration file, and whether it was named on the command line.
#[derive(Debug, Clone)]
pub struct ConfigFile {
    path: PathBuf,
    explicit: bool,
}

impl ConfigFile {
    /// The file that `--config` names, or the one in the user's configuration directory.
    ///
    /// # Errors
    /// Usage, when there is neither a home directory nor the option.
    pub fn locate(named: Option<&Path>) -> Result<Self> {
        if let Some(path) = named {
            return Ok(Self {
                path: path.to_owned(),
                explicit: true,
            });
        }
        let base = std::env::var_os("XDG_CONFIG_HOME")
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
            .or_else(|| std::env::home_dir().map(|home| home.join(".config")));
        match base {
            Some(base) => Ok(Self {
                path: base.join("kvm-clone-ctl/config.toml"),
                explicit: false,
            }),
            None => {
                Err(Error::usage("there is no home directory").hint("name a file with --config"))
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it says. A file that nobody named need not exist.
    ///
    /// # Errors
    /// Usage, naming file and line.
    pub fn load(&self) -> Result<Config> {
        match std::fs::read_to_string(&self.path) {
            Ok(text) => self.parse(&text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !self.explicit => {
                Ok(Config::default())
            }
            Err(error) => Err(Error::usage(format!(
                "cannot read the configuration {}",
                self.path.display()
            ))
            .caused_by(error)),
        }
    }

    fn parse(&self, text: &str) -> Result<Config> {
        toml::from_str(text).map_err(|error| {
            Error::usage(format!(
                "the configuration {} is wrong",
                self.path.display()
            ))
            .caused_by(error.to_string().trim_end().to_owned())
            .hint(format!("its keys are: {}", key_names()))
        })
    }

    /// The values that the file sets, as they are written there.
    ///
    /// # Errors
    /// As [`ConfigFile::load`].
    pub fn values(&self) -> Result<Vec<(&'static str, Option<serde_json::Value>)>> {
        self.load()?;
        let document = self.document()?;
        let value = |key: &Key| {
            document
                .get(key.name)
                .and_then(toml_edit::Item::as_value)
                .map(to_json)
        };
        Ok(KEYS.iter().map(|key| (key.name, value(key))).collect())
    }

    /// Writes the commented template.
    ///
    /// # Errors
    /// Refused, when there is a file already.
    pub fn init(&self) -> Result<()> {
        self.make_directory()?;
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&self.path)
            .map_err(|error| {
                if error.kind() == std::io::ErrorKind::AlreadyExists {
                    Error::new(
                        ErrorCode::Refused,
                        format!("{} exists already", self.path.display()),
                    )
                    .hint("change it with \"config set KEY VALUE\", or remove it first")
                } else {
                    Error::io(format!("cannot write {}", self.path.display()), error)
                }
            })?;
        file.write_all(TEMPLATE.as_bytes())
            .map_err(|error| Error::io(format!("cannot write {}", self.path.display()), error))
    }

    /// Sets a key. Comments and order stay.
    ///
    /// # Errors
    /// Usage, for a key that is not known or a value that it does not take.
    pub fn set(&self, key: &str, values: &[String]) -> Result<()> {
        check_key(key)?;
        let mut document = self.document()?;
        document[key] = match values {
            _ if key == "ssh-options" => {
                toml_edit::value(values.iter().collect::<toml_edit::Array>())
            }
            [value] => toml_edit::value(value),
            _ => return Err(Error::usage(format!("{key} takes one value"))),
        };
        self.replace(&document.to_string())
    }

    /// Takes a key out of the file; what is not there needs no taking out.
    ///
    /// # Errors
    /// Usage, for a key that is not known.
    pub fn unset(&self, key: &str) -> Result<()> {
        check_key(key)?;
        let mut document = self.document()?;
        match document.remove(key) {
            Some(_) => self.replace(&document.to_string()),
            None => Ok(()),
        }
    }

    fn document(&self) -> Result<DocumentMut> {
        let text = match std::fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => {
                return Err(Error::io(
                    format!("cannot read {}", self.path.display()),
                    error,
                ));
            }
        };
        text.parse().map_err(|error: toml_edit::TomlError| {
            Error::usage(format!(
                "the configuration {} is wrong",
                self.path.display()
            ))
            .caused_by(error.to_string().trim_end().to_owned())
        })
    }

    /// Puts a new file in place of the old one, if it is right.
    fn replace(&self, text: &str) -> Result<()> {
        self.parse(text)?;
        self.make_directory()?;
        // A symbolic link, such as those of dotfile collections, stays one.
        let path = std::fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let failed = |error| Error::io(format!("cannot write {}", path.display()), error);
        let directory = path.parent().unwrap_or_else(|| Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(directory).map_err(failed)?;
        file.write_all(text.as_bytes()).map_err(failed)?;
        if let Ok(old) = std::fs::metadata(&path) {
            file.as_file()
                .set_permissions(old.permissions())
                .map_err(failed)?;
        }
        file.as_file().sync_all().map_err(failed)?;
        file.persist(&path).map_err(|error| failed(error.error))?;
        Ok(())
    }

    fn make_directory(&self) -> Result<()> {
        match self
            .path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
        {
            Some(parent) => std::fs::create_dir_all(parent).map_err(|error| {
                Error::io(
                    format!("cannot make the directory {}", parent.display()),
                    error,
                )
            }),
            None => Ok(()),
        }
    }
}

fn to_json(value: &toml_edit::Value) -> serde_json::Value {
    match value {
        toml_edit::Value::String(text) => text.value().as_str().into(),
        toml_edit::Value::Integer(number) => (*number.value()).into(),
        toml_edit::Value::Array(array) => array.iter().map(to_json).collect(),
        other => other.to_string().trim().into(),
    }
}

fn check_key(key: &str) -> Result<()> {
    if KEYS.iter().any(|known| known.name == key) {
        return Ok(());
    }
    Err(Error::usage(format!(
        "there is no key \"{}\" in the configuration",
        key.escape_debug()
    ))
    .hint(format!("its keys are: {}", key_names())))
}

fn key_names() -> String {
    KEYS.map(|key| key.name).join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> (tempfile::TempDir, ConfigFile) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        (
            directory,
            ConfigFile {
                path,
                explicit: true,
            },
        )
    }

    #[test]
    fn the_template_is_valid_and_names_every_key() {
        let (_directory, config) = file(TEMPLATE);
        assert_eq!(config.load().unwrap(), Config::default());
        let live: String = TEMPLATE
            .lines()
            .map(|line| {
                line.strip_prefix('#')
                    .filter(|rest| !rest.starts_with(' '))
                    .unwrap_or(line)
            })
            .fold(String::new(), |text, line| text + line + "\n");
        let set: toml::Table = live.parse().unwrap();
        assert_eq!(set.len(), KEYS.len());
        for key in KEYS {
            assert!(set.contains_key(key.name), "{}", key.name);
        }
        file(&live).1.load().unwrap();
    }

    #[test]
    fn values_are_those_of_the_command_line() {
        let (_directory, config) =
            file("compress = 3\nbandwidth-limit = \"10M\"\nssh-options = [\"A=b\"]\n");
        let config = config.load().unwrap();
        assert_eq!(config.bandwidth_limit, Some(Rate(10_000_000)));
        assert_eq!(config.compress, Some("3".parse().unwrap()));
        assert_eq!(config.ssh_options, ["A=b"]);
    }

    #[test]
    fn errors_name_file_line_and_keys() {
        for (text, what) in [
            ("# x\nspeed = 1\n", "speed"),
            (
                "# x\nroute = \"teleport\"\n",
                "expected auto, direct or relay",
            ),
            ("# x\nmethod = \"ftp\"\n", "expected rsync"),
            ("# x\nroute\n", "line 2"),
        ] {
            let (_directory, config) = file(text);
            let error = config.load().unwrap_err();
            assert_eq!(error.code(), ErrorCode::Usage);
            let text = error.for_people();
            assert!(
                text.contains("config.toml") && text.contains("line 2"),
                "{text}"
            );
            assert!(
                text.contains(what) && text.contains("ssh-options"),
                "{text}"
            );
        }
    }

    #[test]
    fn set_and_unset_keep_comments_and_refuse_what_is_wrong() {
        let (_directory, config) = file("# mine\nroute = \"relay\" # slow\n");
        config.set("compress", &["9".to_owned()]).unwrap();
        config
            .set("ssh-options", &["A=b".to_owned(), "C=d".to_owned()])
            .unwrap();
        config.set("route", &["auto".to_owned()]).unwrap();
        let text = std::fs::read_to_string(config.path()).unwrap();
        assert!(text.contains("# mine"), "{text}");
        let read = config.load().unwrap();
        assert_eq!(read.ssh_options, ["A=b", "C=d"]);
        assert_eq!(read.route, Some(RouteChoice::Auto));
        for (key, value) in [("compress", "20"), ("nothing", "1")] {
            assert_eq!(
                config.set(key, &[value.to_owned()]).unwrap_err().code(),
                ErrorCode::Usage
            );
        }
        assert_eq!(
            config.load().unwrap(),
            read,
            "a refused change leaves the file alone"
        );
        config.unset("compress").unwrap();
        assert_eq!(config.load().unwrap().compress, None);
    }

    #[test]
    fn init_never_overwrites() {
        let (directory, config) = file("route = \"relay\"\n");
        assert_eq!(config.init().unwrap_err().code(), ErrorCode::Refused);
        let fresh = ConfigFile {
            path: directory.path().join("a/b.toml"),
            explicit: true,
        };
        assert!(fresh.load().is_err(), "a file that was named must exist");
        fresh.init().unwrap();
        fresh.load().unwrap();
    }
}
