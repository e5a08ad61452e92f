//! What several hosts answered to one command: printed in the hosts' order, and one error for all
//! that failed.

use serde::Serialize;

use super::{App, combined, side_by_side};
use crate::endpoint::HostSpec;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::output;

/// What scripts get.
#[derive(Debug, Serialize)]
struct Report<T> {
    operation: &'static str,
    success: bool,
    hosts: Vec<Answer<T>>,
}

/// One host, of several in an answer.
#[derive(Debug, Serialize)]
pub(super) struct Answer<T> {
    pub(super) host: String,
    #[serde(flatten)]
    pub(super) answer: Option<T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<Failure>,
}

/// The error of one host; the whole of it goes to standard error.
#[derive(Debug, Serialize)]
pub(super) struct Failure {
    pub(super) code: crate::error::ErrorCode,
    message: String,
    hint: Option<String>,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        Self {
            code: error.code(),
            message: error.one_line(),
            hint: error.hint_text().map(str::to_owned),
        }
    }
}

/// Does `work` on every host, prints what came of it, and ends with the failures.
pub(super) async fn report<T, F>(
    app: &App,
    operation: &'static str,
    specs: Vec<HostSpec>,
    work: impl Fn(Host) -> F,
    text: impl FnOnce(&[Answer<T>]) -> String,
) -> Result<()>
where
    T: Serialize + Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    report_judged(app, operation, specs, work, |_| Ok(()), text).await
}

/// The same where an answer may itself be a failure: `judge` says so, and both are printed.
pub(super) async fn report_judged<T, F>(
    app: &App,
    operation: &'static str,
    specs: Vec<HostSpec>,
    work: impl Fn(Host) -> F,
    judge: impl Fn(&T) -> Result<()>,
    text: impl FnOnce(&[Answer<T>]) -> String,
) -> Result<()>
where
    T: Serialize + Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let n_hosts = specs.len();
    let hosts = specs.iter().map(|spec| app.host(spec)).collect();
    let (mut answers, mut errors) = (Vec::new(), Vec::new());
    for (host, answer) in side_by_side(hosts, work).await {
        let (answer, error) = match answer {
            Ok(answer) => {
                let error = judge(&answer).err();
                (Some(answer), error)
            }
            Err(error) => (None, Some(error)),
        };
        answers.push(Answer {
            host: host.to_string(),
            answer,
            error: error.as_ref().map(Into::into),
        });
        errors.extend(error.map(|error| (host, error)));
    }
    let report = Report {
        operation,
        success: errors.is_empty(),
        hosts: answers,
    };
    output::print(&report, app.format(), || text(&report.hosts))?;
    combined(errors, n_hosts)
}
