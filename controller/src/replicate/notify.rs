//! How alarms reach people: a command, a mail, a webhook, a heartbeat. All of them are programs of
//! the controller's machine; a URL, which may hold a secret, is on no command line.

use std::time::Duration;

use super::alarms::{Event, Notice};
use super::policy::Notify;
use crate::error::{Error, ErrorCode, Result};
use crate::host::Host;

/// How long one way may take.
const LIMIT: Duration = Duration::from_secs(30);

/// Tells all that the file of policies names, and gives back what failed.
pub async fn tell(here: &Host, notify: &Notify, notice: &Notice) -> Vec<Error> {
    let json = serde_json::to_string(notice).unwrap_or_default();
    let mut failed = Vec::new();
    if let Some(command) = &notify.command {
        let told = here.user_command(command, &[], json.as_bytes(), LIMIT);
        let told = told.await.err();
        failed.extend(told.map(|error| error.context("the command of [notify] failed")));
    }
    if let Some(address) = &notify.mail {
        let words = ["sendmail", "-oi", "--", address];
        let mail = mail(address, notice);
        failed.extend(run(here, "the mail", &words, mail.as_bytes()).await.err());
    }
    if let Some(url) = &notify.webhook {
        let config = format!(
            "url = {}\nheader = \"Content-Type: application/json\"\ndata = {}\n",
            quoted(url),
            quoted(&json)
        );
        failed.extend(fetch(here, "the webhook", &config).await.err());
    }
    failed
}

/// Fetches the heartbeat's URL.
///
/// # Errors
/// When that fails.
pub async fn beat(here: &Host, url: &str) -> Result<()> {
    fetch(here, "the heartbeat", &format!("url = {}\n", quoted(url))).await
}

async fn fetch(here: &Host, what: &str, config: &str) -> Result<()> {
    let seconds = LIMIT.as_secs().to_string();
    let words = [
        "curl",
        "--silent",
        "--show-error",
        "--fail",
        "--output",
        "/dev/null",
        "--max-time",
        &seconds,
        "--config",
        "-",
    ];
    run(here, what, &words, config.as_bytes()).await
}

async fn run(here: &Host, what: &str, words: &[&str], input: &[u8]) -> Result<()> {
    let failed = |why: String| {
        Error::new(ErrorCode::Io, format!("{what} of [notify] failed")).caused_by(why)
    };
    match tokio::time::timeout(LIMIT, here.tool(words, input)).await {
        Err(_) => Err(failed(format!("it took more than {} s", LIMIT.as_secs()))),
        Ok(Err(error)) => Err(failed(error.one_line())),
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => Err(failed(format!(
            "{}: {}",
            output.status,
            output.stderr.trim()
        ))),
    }
}

/// A value of curl's configuration.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

fn mail(address: &str, notice: &Notice) -> String {
    let Notice {
        event,
        kind,
        policy,
        vm,
        message,
        raised_at,
    } = notice;
    let of = match vm.as_str() {
        "" => policy.clone(),
        vm => format!("{policy} {vm}"),
    };
    let subject = match event {
        Event::Over => format!("{of}: well again"),
        _ => format!("{of}: {}", kind.name()),
    };
    // A name is a part of one line, whatever it holds.
    let subject: String = subject.chars().filter(|c| !c.is_control()).collect();
    format!(
        "To: {address}\nSubject: [kvm-clone-ctl] {subject}\n\
         Content-Type: text/plain; charset=utf-8\n\n\
         {message}\n\nalarm: {}, {} since {raised_at}\n",
        event.name(),
        kind.name()
    )
}
