//! What lies between the tools and the sshd: nothing but the loopback, or a link of a limited rate
//! between two network namespaces.

use std::net::Ipv4Addr;

use anyhow::Result;

use crate::namespace::{self, Namespace};
use crate::rate::Rate;

/// The way from the tools to the sshd.
#[derive(Debug)]
pub(crate) enum Link {
    Loopback,
    /// The tools run in the first, the sshd in the second.
    Shaped([Namespace; 2]),
}

impl Link {
    /// Two namespaces with a link between them; needs root.
    pub(crate) fn shaped() -> Result<Self> {
        namespace::joined().map(Self::Shaped)
    }

    /// Has the link carry so much from now on, in each direction.
    pub(crate) fn limit(&self, rate: Rate) -> Result<()> {
        match self {
            Self::Loopback => Ok(()),
            Self::Shaped(ends) => ends.iter().try_for_each(|end| end.limit(rate)),
        }
    }

    /// Where the tools find the sshd.
    pub(crate) fn address(&self) -> Ipv4Addr {
        match self {
            Self::Loopback => Ipv4Addr::LOCALHOST,
            Self::Shaped(_) => namespace::ADDRESSES[1],
        }
    }

    /// Does something where the tools run.
    pub(crate) fn at_source<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        match self {
            Self::Loopback => work(),
            Self::Shaped([source, _]) => source.inside(work),
        }
    }

    /// Does something where the sshd runs.
    pub(crate) fn at_destination<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        match self {
            Self::Loopback => work(),
            Self::Shaped([_, destination]) => destination.inside(work),
        }
    }
}
