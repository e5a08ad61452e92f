//! Replication: policies say which VMs have a replica on another host, how old that may be, and
//! which older points stay. What one run does with one VM is `vm`'s business
//! ([`replica`](crate::vm::replica)); here is which VMs, when, and what is removed after it.
//!
//! ```text
//!  policies (policy) ─ which are due (schedule) ─ VMs side by side (run)
//!                                                  └ a new point each ─ points that go (keep)
//!  a policy, or a directory of replicas ─ VMs started from their points (failover)
//!
//!  the daemon: which VM is next (scheduler) ─ one VM (run) ─ what is wrong (alarms) ─ who hears (notify)
//!                                                           └ how much, how old (metrics)
//!
//!  what there is (status) and what was done (the history) ─ a page for people (report)
//! ```

pub mod alarms;
pub mod check;
pub mod daemon;
pub mod failover;
pub mod keep;
pub mod listen;
pub mod metrics;
pub mod notify;
pub mod policy;
pub mod report;
pub mod run;
pub mod schedule;
pub mod scheduler;
pub mod status;
pub mod systemd;
