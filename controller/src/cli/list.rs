//! `list`: the VMs of several hosts.

use clap::{Args, ValueEnum};
use comfy_table::Table;
use serde::Serialize;

use super::{App, combined, side_by_side};
use crate::endpoint::HostSpec;
use crate::error::{Error, Result};
use crate::libvirt::{DomainState, Hypervisor, VmSummary};
use crate::output;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Host: [USER@]NAME[:PORT], an alias of the ssh configuration, or "local" [default: local]
    #[arg(value_name = "HOST")]
    hosts: Vec<HostSpec>,
    /// Show only VMs in this state
    #[arg(long, value_name = "STATE", default_value = "all")]
    status: Status,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Status {
    All,
    Running,
    Stopped,
    Paused,
}

impl Status {
    fn matches(self, state: Option<DomainState>) -> bool {
        match self {
            Self::All => true,
            Self::Running => state == Some(DomainState::Running),
            Self::Stopped => state.is_some_and(DomainState::is_off),
            Self::Paused => matches!(state, Some(DomainState::Paused | DomainState::Sleeping)),
        }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    operation: &'static str,
    success: bool,
    hosts: Vec<OnHost>,
}

#[derive(Debug, Serialize)]
struct OnHost {
    host: String,
    success: bool,
    vms: Vec<VmSummary>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Error>,
}

pub(super) async fn run(app: &App, args: Arguments) -> Result<()> {
    let specs = if args.hosts.is_empty() {
        vec![HostSpec::Local]
    } else {
        args.hosts
    };
    let hosts: Vec<_> = specs.iter().map(|spec| app.host(spec)).collect();
    let n_hosts = hosts.len();
    let connect = app.connect().to_owned();
    let look = |host| {
        let on = Hypervisor::new(host, connect.clone());
        async move { on.inventory().await }
    };
    let (mut found, mut errors) = (Vec::new(), Vec::new());
    for (host, answer) in side_by_side(hosts, look).await {
        let (vms, error) = match answer {
            Ok(vms) => (vms, None),
            Err(error) => (Vec::new(), Some(error)),
        };
        found.push(OnHost {
            host: host.to_string(),
            success: error.is_none(),
            vms: vms
                .into_iter()
                .filter(|vm| args.status.matches(vm.state))
                .collect(),
            error: error.as_ref().map(Error::like),
        });
        errors.extend(error.map(|error| (host, error)));
    }
    let report = Report {
        operation: "list",
        success: errors.is_empty(),
        hosts: found,
    };
    output::print(&report, app.format(), || {
        output::table_text(&table(&report))
    })?;
    combined(errors, n_hosts)
}

fn table(report: &Report) -> Table {
    let mut table = output::table(&[
        "host",
        "name",
        "state",
        "vCPUs",
        "memory",
        "disks",
        "networks",
        "autostart",
    ]);
    for on in &report.hosts {
        let host = || on.host.clone();
        if let Some(error) = &on.error {
            table.add_row([host(), "-".to_owned(), error.one_line()]);
        }
        for vm in &on.vms {
            table.add_row([
                host(),
                output::printable(&vm.name),
                vm.state
                    .map_or_else(|| "unknown".to_owned(), |state| state.to_string()),
                vm.vcpus.to_string(),
                output::iec(vm.memory_bytes),
                disks(vm),
                vm.networks.join(", "),
                if vm.autostart { "yes" } else { "no" }.to_owned(),
            ]);
        }
    }
    table
}

/// A line a disk: target, virtual size, and in brackets what it occupies.
fn disks(vm: &VmSummary) -> String {
    let size = |bytes: Option<u64>| bytes.map_or_else(|| "?".to_owned(), output::iec);
    let lines = vm
        .disks
        .iter()
        .filter(|disk| disk.source.is_some())
        .map(|disk| {
            format!(
                "{} {} ({})",
                disk.target,
                size(disk.bytes_total),
                size(disk.bytes_allocated)
            )
        });
    lines.collect::<Vec<_>>().join("\n")
}
