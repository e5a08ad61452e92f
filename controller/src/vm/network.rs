//! How a clone's network interfaces are connected on the destination: `--network-map` and
//! `--network-config`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::libvirt::definition::{Interface, InterfaceSource, MacAddress};

/// What the user says about a clone's network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct NetworkConfig {
    /// For the name of a network or bridge on the source, the one on the destination.
    #[serde(default)]
    pub map: BTreeMap<String, String>,
    /// For single interfaces; these go before the map.
    #[serde(default, rename = "interface")]
    pub interfaces: Vec<InterfaceConfig>,
}

/// What the user says about one interface.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct InterfaceConfig {
    /// The address that the interface has on the source.
    pub mac: String,
    /// A network, `network:NAME` or `bridge:NAME` of the destination.
    pub to: Option<String>,
    /// The address that it gets; otherwise as without this file.
    pub new_mac: Option<String>,
}

/// What a name on the destination is.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    /// Networks of libvirt.
    pub(super) networks: Vec<String>,
    /// Those of them that are started.
    pub(super) active_networks: Vec<String>,
    /// Network devices, bridges among them.
    pub(super) devices: Vec<String>,
}

impl NetworkConfig {
    /// Reads a file, TOML where its name ends in `.toml`, else YAML.
    ///
    /// # Errors
    /// Usage, naming the file and what is wrong in it.
    pub fn load(path: &Path) -> Result<Self> {
        let wrong = |message: String| {
            Error::usage(format!(
                "the network configuration {} is wrong",
                path.display()
            ))
            .caused_by(message)
            .hint("it holds \"map\" (OLD: NEW) and a list \"interface\" with mac, to and new-mac")
        };
        let text = std::fs::read_to_string(path).map_err(|error| {
            Error::usage(format!(
                "cannot read the network configuration {}",
                path.display()
            ))
            .caused_by(error)
        })?;
        let config: Self = if path
            .extension()
            .is_some_and(|extension| extension == "toml")
        {
            toml::from_str(&text).map_err(|error| wrong(error.to_string()))?
        } else {
            serde_saphyr::from_str(&text).map_err(|error| wrong(error.to_string()))?
        };
        for interface in &config.interfaces {
            for mac in [Some(&interface.mac), interface.new_mac.as_ref()]
                .into_iter()
                .flatten()
            {
                mac.parse::<MacAddress>()
                    .map_err(|error| wrong(error.to_string()))?;
            }
        }
        Ok(config)
    }

    /// Takes in `OLD=NEW` from the command line, which goes before the file.
    ///
    /// # Errors
    /// Usage, for anything else.
    pub fn add(&mut self, rule: &str) -> Result<()> {
        match rule.split_once('=') {
            Some((old, new)) if !old.is_empty() && !new.is_empty() => {
                self.map.insert(old.to_owned(), new.to_owned());
                Ok(())
            }
            _ => Err(
                Error::usage(format!("--network-map {rule}: expected OLD=NEW"))
                    .hint("OLD is a network or bridge of the source, NEW one of the destination"),
            ),
        }
    }

    /// Where an interface is to be connected, if the user says so.
    pub(super) fn target(&self, interface: &Interface) -> Option<&str> {
        let own = self.rule(interface).and_then(|rule| rule.to.as_deref());
        own.or_else(|| {
            self.map
                .get(name_of(&interface.source)?)
                .map(String::as_str)
        })
    }

    /// The address that the user wants an interface to have.
    pub(super) fn new_mac(&self, interface: &Interface) -> Option<MacAddress> {
        self.rule(interface)?.new_mac.as_ref()?.parse().ok()
    }

    fn rule(&self, interface: &Interface) -> Option<&InterfaceConfig> {
        let mac: MacAddress = interface.mac.as_ref()?.parse().ok()?;
        self.interfaces.iter().find(|rule| {
            rule.mac
                .parse::<MacAddress>()
                .is_ok_and(|theirs| theirs == mac)
        })
    }
}

/// The network, bridge or device that an interface is connected to.
pub(super) fn name_of(source: &InterfaceSource) -> Option<&str> {
    match source {
        InterfaceSource::Network(name)
        | InterfaceSource::Bridge(name)
        | InterfaceSource::Direct(name) => Some(name),
        InterfaceSource::Other(_) => None,
    }
}

impl Known {
    /// What a name given by the user means on the destination, the kind that the interface had
    /// being the first choice; `None` when nothing has that name.
    pub(super) fn resolve(&self, wanted: &str, had: &InterfaceSource) -> Option<InterfaceSource> {
        let network = |name: &str| {
            let known = self.networks.iter().any(|known| known == name);
            known.then(|| InterfaceSource::Network(name.to_owned()))
        };
        let bridge = |name: &str| {
            let known = self.devices.iter().any(|known| known == name);
            known.then(|| InterfaceSource::Bridge(name.to_owned()))
        };
        let direct = |name: &str| {
            let known = self.devices.iter().any(|known| known == name);
            known.then(|| InterfaceSource::Direct(name.to_owned()))
        };
        if let Some(name) = wanted.strip_prefix("network:") {
            return network(name);
        }
        if let Some(name) = wanted.strip_prefix("bridge:") {
            return bridge(name);
        }
        match had {
            InterfaceSource::Direct(_) => direct(wanted).or_else(|| network(wanted)),
            InterfaceSource::Bridge(_) => bridge(wanted).or_else(|| network(wanted)),
            _ => network(wanted).or_else(|| bridge(wanted)),
        }
    }

    /// Whether the destination has what an interface is connected to.
    pub(super) fn has(&self, source: &InterfaceSource) -> bool {
        match source {
            InterfaceSource::Network(name) => self.networks.contains(name),
            InterfaceSource::Bridge(name) | InterfaceSource::Direct(name) => {
                self.devices.contains(name)
            }
            InterfaceSource::Other(_) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(mac: &str, source: InterfaceSource) -> Interface {
        Interface {
            mac: Some(mac.to_owned()),
            source,
            model: None,
        }
    }

    fn config(name: &str, text: &str) -> Result<NetworkConfig> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        NetworkConfig::load(&path)
    }

    #[test]
    fn yaml_and_toml_say_the_same() {
        let yaml = config(
            "net.yaml",
            "map:\n  default: lab\ninterface:\n  - mac: 52:54:00:AA:00:01\n    to: bridge:br1\n    new-mac: 52:54:00:aa:00:02\n",
        );
        let toml = config(
            "net.toml",
            "[map]\ndefault = \"lab\"\n[[interface]]\nmac = \"52:54:00:AA:00:01\"\nto = \"bridge:br1\"\nnew-mac = \"52:54:00:aa:00:02\"\n",
        );
        let yaml = yaml.unwrap();
        assert_eq!(yaml, toml.unwrap());
        let one = interface(
            "52:54:00:aa:00:01",
            InterfaceSource::Network("default".into()),
        );
        let other = interface(
            "52:54:00:aa:00:09",
            InterfaceSource::Network("default".into()),
        );
        assert_eq!(
            (yaml.target(&one), yaml.target(&other)),
            (Some("bridge:br1"), Some("lab"))
        );
        assert_eq!(yaml.new_mac(&one).unwrap().to_string(), "52:54:00:aa:00:02");
        assert!(yaml.new_mac(&other).is_none());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (name, text, what) in [
            ("a.yaml", "maps: {}\n", "maps"),
            ("a.toml", "[[interface]]\nmac = \"x\"\n", "x"),
        ] {
            let error = config(name, text).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.one_line().contains(what), "{error:?}");
        }
        let missing = NetworkConfig::load(Path::new("/nonexistent/net.yaml")).unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/net.yaml"));
        for rule in ["", "a", "=b", "a="] {
            assert!(NetworkConfig::default().add(rule).is_err(), "{rule}");
        }
    }

    #[test]
    fn a_name_means_what_the_interface_had_first() {
        let known = Known {
            networks: vec!["lab".into(), "both".into()],
            active_networks: Vec::new(),
            devices: vec!["br1".into(), "both".into()],
        };
        let (network, bridge) = (
            InterfaceSource::Network("x".into()),
            InterfaceSource::Bridge("x".into()),
        );
        for (wanted, had, expected) in [
            ("lab", &bridge, Some(InterfaceSource::Network("lab".into()))),
            (
                "both",
                &bridge,
                Some(InterfaceSource::Bridge("both".into())),
            ),
            (
                "both",
                &network,
                Some(InterfaceSource::Network("both".into())),
            ),
            (
                "bridge:both",
                &network,
                Some(InterfaceSource::Bridge("both".into())),
            ),
            ("network:br1", &network, None),
            ("nowhere", &network, None),
        ] {
            assert_eq!(known.resolve(wanted, had), expected, "{wanted}");
        }
    }
}
