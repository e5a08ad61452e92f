//! Which commands a controller may have this agent run, to reach the agent on another host.
//!
//! A command that is run as this user is a way around everything that `--allow` keeps a controller
//! from. With `--dial` a confined agent runs one command all the same, and none that is not exactly
//! what kvm-clone-ctl sends for the route `direct`:
//!
//! ```text
//!  ssh -T -e none -o OPTION … -p PORT -l USER -- HOST 'exec [sudo -n] …/kvm-clone-agent attach NAME'
//! ```
//!
//! Whoever controls such an agent can still make this host log in elsewhere with its own keys, and
//! start an `attach` there.

use kvm_clone_protocol::message::FailureCode;

use crate::failure::Failure;

/// What a controller may have this agent run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Commands {
    /// It runs any command: nothing confines it.
    Any,
    /// It runs ssh to an agent on another host.
    SshToAgents,
    /// It connects to agents of this user on this host, and runs nothing else.
    None,
}

/// Values of `-o` in the controller's command. Another one could run a program or write a file.
const OPTIONS: [&str; 16] = [
    "BatchMode=yes",
    "ConnectTimeout=5",
    "StrictHostKeyChecking=yes",
    "UserKnownHostsFile={known_hosts}",
    "GlobalKnownHostsFile=/dev/null",
    "ControlMaster=no",
    "ControlPath=none",
    "ForwardAgent=no",
    "ClearAllForwardings=yes",
    "PermitLocalCommand=no",
    "RemoteCommand=none",
    "UpdateHostKeys=no",
    "LogLevel=ERROR",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",
    "Ciphers=^aes128-gcm@openssh.com",
];

impl Commands {
    /// Refuses a command that is not allowed. An empty one is this very program's `attach`.
    ///
    /// # Errors
    /// [`Failure`] of code refused.
    pub(crate) fn permit(self, command: &[Vec<u8>]) -> Result<(), Failure> {
        let is_permitted = match self {
            Self::Any => true,
            Self::SshToAgents => command.is_empty() || is_ssh_to_an_agent(command),
            Self::None => command.is_empty(),
        };
        if is_permitted {
            return Ok(());
        }
        let what = match self {
            Self::SshToAgents => "it reaches other agents by kvm-clone-ctl's own ssh command alone",
            _ => "it reaches no other host (it was started without --dial)",
        };
        let message = format!(
            "this agent does not run what it was asked to: {what}; --route relay does without, and \
             so does a run that is started on the other host"
        );
        Err(Failure::new(FailureCode::Refused, message))
    }
}

fn is_ssh_to_an_agent(command: &[Vec<u8>]) -> bool {
    let words: Option<Vec<&str>> = command
        .iter()
        .map(|word| std::str::from_utf8(word).ok())
        .collect();
    let words = words.unwrap_or_default();
    let Some(mut rest) = words.strip_prefix(&["ssh", "-T", "-e", "none"]) else {
        return false;
    };
    while let ["-o", option, after @ ..] = rest {
        if !OPTIONS.contains(option) {
            return false;
        }
        rest = after;
    }
    match rest {
        ["-p", port, "-l", user, "--", host, remote] => {
            port.parse::<u16>().is_ok() && is_name(user) && is_name(host) && is_attach(remote)
        }
        _ => false,
    }
}

/// A host or a user, and no option.
fn is_name(word: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-:%".contains(&byte);
    !word.starts_with('-') && !word.is_empty() && word.bytes().all(is_plain)
}

/// Words that no shell reads otherwise.
fn is_attach(remote: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"./_-+".contains(&byte);
    let words: Vec<&str> = remote.split(' ').collect();
    let (["exec", "sudo", "-n", rest @ ..] | ["exec", rest @ ..]) = words.as_slice() else {
        return false;
    };
    let [program, "attach", name] = rest else {
        return false;
    };
    let file = program.rsplit('/').next().unwrap_or_default();
    let is_agent = file == "kvm-clone-agent" || program.contains("/kvm-clone/agent-");
    is_agent
        && program.bytes().all(is_plain)
        && !program.starts_with('-')
        && !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(change: impl Fn(&mut Vec<&str>)) -> Vec<Vec<u8>> {
        let mut words = vec!["ssh", "-T", "-e", "none"];
        words.extend(OPTIONS.iter().flat_map(|option| ["-o", option]));
        words.extend(["-p", "22022", "-l", "root", "--", "10.0.0.1"]);
        words.push("exec /root/.cache/kvm-clone/agent-0.1.0-0123456789abcdef attach 00ff");
        change(&mut words);
        words.into_iter().map(Into::into).collect()
    }

    #[test]
    fn what_the_controller_sends_is_run_with_dial_alone() {
        let command = command(|_| {});
        assert_eq!(Commands::Any.permit(&command), Ok(()));
        assert_eq!(Commands::SshToAgents.permit(&command), Ok(()));
        let refused = Commands::None.permit(&command).unwrap_err();
        assert_eq!(refused.code, FailureCode::Refused);
        assert!(refused.message.contains("--route relay"), "{refused}");
        for commands in [Commands::Any, Commands::SshToAgents, Commands::None] {
            assert_eq!(commands.permit(&[]), Ok(()));
        }
    }

    #[test]
    fn an_agent_is_known_by_its_name_and_may_be_run_by_sudo() {
        for remote in [
            "exec kvm-clone-agent attach 0a",
            "exec /opt/kvm-clone-agent attach 0a",
            "exec sudo -n /usr/local/lib/kvm-clone/kvm-clone-agent attach 0a",
        ] {
            assert!(is_attach(remote), "{remote}");
        }
        for remote in [
            "",
            "kvm-clone-agent attach 0a",
            "exec rm attach 0a",
            "exec /bin/sh attach 0a",
            "exec kvm-clone-agent attach ",
            "exec kvm-clone-agent attach a;b",
            "exec kvm-clone-agent serve 0a",
            "exec kvm-clone-agent attach 0a b",
            "exec sudo -n -s/kvm-clone-agent attach 0a",
            "exec $(touch x)/kvm-clone-agent attach 0a",
            "exec x;/kvm-clone-agent attach 0a",
            "exec sudo kvm-clone-agent attach 0a",
        ] {
            assert!(!is_attach(remote), "{remote}");
        }
    }

    #[test]
    fn another_command_is_not_run() {
        type Change = fn(&mut Vec<&str>);
        let changes: [Change; 10] = [
            |words| words[0] = "sh",
            |words| words[0] = "./ssh",
            |words| words.insert(4, "-v"),
            |words| words[5] = "ProxyCommand=touch x",
            |words| words[5] = "UserKnownHostsFile=/root/.ssh/authorized_keys",
            |words| *words.iter_mut().rev().nth(1).unwrap() = "-oProxyCommand=x",
            |words| *words.iter_mut().rev().nth(1).unwrap() = "a b",
            |words| *words.last_mut().unwrap() = "touch x",
            |words| words.push("x"),
            |words| words.truncate(6),
        ];
        for change in changes {
            let command = command(change);
            assert!(
                Commands::SshToAgents.permit(&command).is_err(),
                "{command:?}"
            );
        }
        assert!(Commands::SshToAgents.permit(&[vec![0xff]]).is_err());
    }
}
