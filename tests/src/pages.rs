//! The pages for people: the commands that their readers type, the files that they write, and where
//! their links lead.
//!
//! ````text
//!   <!-- exit 5 -->              notes, which no reader sees: how the block below is tried
//!   ```console
//!   $ kvm-clone-ctl …            at the administrator's machine; `# `: the same as root
//!   hv1# virsh …                 as root on the host hv1
//!   what it prints
//!   ```
//! ````
//!
//! | note | meaning |
//! | --- | --- |
//! | `exit 5` | the block's last command ends with this code, and not with 0 |
//! | `first: hv1# …` | this is run ahead of the block |
//! | `with: WORD = hv2# …` | WORD stands for what this prints |
//! | `until: hv2# …` | the last command waits for Ctrl-C, and gets it once this succeeds |
//! | `file: PATH` | the block below is the contents of this file |
//! | `run by: FILE` | this file has the commands run; `as: …` in another form, which it holds |
//!
//! [`crate::desk`] does what they say.

use std::fs;
use std::path::{Path, PathBuf};

/// A page that was read.
#[derive(Debug)]
pub struct Page {
    /// Its path from the root of the repository.
    pub name: String,
    /// Its blocks of commands and files, in order.
    pub blocks: Vec<Block>,
    /// Its text, without what is in blocks.
    pub prose: Vec<(usize, String)>,
}

/// A block of a page.
#[derive(Debug)]
pub struct Block {
    /// The line on which it begins.
    pub line: usize,
    /// How it is tried.
    pub notes: Vec<Note>,
    /// What is in it.
    pub body: Body,
}

/// What is in a block.
#[derive(Debug)]
pub enum Body {
    /// Commands, with what they print.
    Console(Vec<Step>),
    /// A file.
    File(String),
}

/// A command, and lines that it prints.
#[derive(Debug)]
pub struct Step {
    /// The command.
    pub command: Typed,
    /// What it prints, as far as the page shows it.
    pub prints: Vec<String>,
}

/// A command, typed behind a prompt.
#[derive(Debug, Clone)]
pub struct Typed {
    /// Where.
    pub place: Place,
    /// The command.
    pub text: String,
}

/// Where a command is typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// At the administrator's machine.
    Desk,
    /// On a host, as root.
    Host(String),
}

/// How a block is tried.
#[derive(Debug)]
pub enum Note {
    /// Its last command ends with this code.
    Exit(i32),
    /// This comes first.
    First(Typed),
    /// The word stands for what this prints.
    With(String, Typed),
    /// Its last command gets a Ctrl-C once this succeeds.
    Until(Typed),
    /// It is the contents of this file.
    File(String),
    /// This file has it run, in the form that is said.
    RunBy(String, Option<String>),
}

/// The root of the repository.
///
/// # Panics
/// Never: this crate lies in a directory of it.
#[must_use]
pub fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("below the root").to_owned()
}

/// All pages of the repository.
///
/// # Panics
/// When one cannot be read, or does not keep to the rules for blocks.
#[must_use]
pub fn all() -> Vec<Page> {
    let mut found = Vec::new();
    let mut pending = vec![root()];
    while let Some(directory) = pending.pop() {
        let entries = fs::read_dir(&directory).expect("the repository can be read");
        for entry in entries {
            let path = entry.expect("the repository can be read").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let is_ours = !name.starts_with('.') && !name.starts_with("target");
            if path.is_dir() && is_ours {
                pending.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                let below = path.strip_prefix(root()).expect("it was found there");
                found.push(read(&below.to_string_lossy()));
            }
        }
    }
    found.sort_by(|one: &Page, other| one.name.cmp(&other.name));
    found
}

/// A page, by its path from the root.
///
/// # Panics
/// When it cannot be read, or does not keep to the rules for blocks.
#[must_use]
pub fn read(name: &str) -> Page {
    let text = fs::read_to_string(root().join(name));
    let text = text.unwrap_or_else(|error| panic!("{name}: {error}"));
    parse(name, &text)
}

fn parse(name: &str, text: &str) -> Page {
    let mut page = Page {
        name: name.to_owned(),
        blocks: Vec::new(),
        prose: Vec::new(),
    };
    let mut notes: Vec<String> = Vec::new();
    let mut lines = text.lines().zip(1..);
    while let Some((line, number)) = lines.next() {
        if let Some(comment) = comment(line) {
            notes.push(comment.to_owned());
            continue;
        }
        let Some(language) = line.strip_prefix("```") else {
            let lost = notes.drain(..).find(|text| note(text).is_some());
            assert_eq!(lost, None, "{name}:{number}: a note without a block");
            page.prose.push((number, line.to_owned()));
            continue;
        };
        let inside: Vec<&str> = lines
            .by_ref()
            .map(|(line, _)| line)
            .take_while(|line| !line.starts_with("```"))
            .collect();
        let at = format!("{name}:{number}");
        let notes: Vec<Note> = std::mem::take(&mut notes)
            .iter()
            .map(|text| note(text).unwrap_or_else(|| panic!("{at}: a note {text:?}")))
            .collect();
        let is_file = notes.iter().any(|note| matches!(note, Note::File(_)));
        let body = match language {
            "console" => Body::Console(steps(&at, &inside)),
            _ if is_file => Body::File(inside.join("\n") + "\n"),
            _ => continue,
        };
        page.blocks.push(Block {
            line: number,
            notes,
            body,
        });
    }
    page
}

fn comment(line: &str) -> Option<&str> {
    let inside = line.strip_prefix("<!--")?.strip_suffix("-->")?;
    Some(inside.trim())
}

fn note(text: &str) -> Option<Note> {
    if let Some(code) = text.strip_prefix("exit ") {
        return code.parse().ok().map(Note::Exit);
    }
    let (key, rest) = text.split_once(": ")?;
    match key {
        "first" => typed(rest).map(Note::First),
        "until" => typed(rest).map(Note::Until),
        "with" => {
            let (word, command) = rest.split_once(" = ")?;
            Some(Note::With(word.to_owned(), typed(command)?))
        }
        "file" => Some(Note::File(rest.to_owned())),
        "run by" => {
            let (file, form) = match rest.split_once(" as: ") {
                Some((file, form)) => (file, Some(form.to_owned())),
                None => (rest, None),
            };
            Some(Note::RunBy(file.to_owned(), form))
        }
        _ => None,
    }
}

/// The command of a line that begins with a prompt.
fn typed(line: &str) -> Option<Typed> {
    let (prompt, text) = line.split_once(' ')?;
    let place = match prompt {
        "$" | "#" => Place::Desk,
        "hv1#" | "hv2#" => Place::Host(prompt.trim_end_matches('#').to_owned()),
        _ => return None,
    };
    let text = text.to_owned();
    Some(Typed { place, text })
}

fn steps(at: &str, lines: &[&str]) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut lines = lines.iter();
    while let Some(line) = lines.next() {
        if let Some(mut command) = typed(line) {
            while command.text.ends_with('\\') {
                let more = lines.next().unwrap_or_else(|| panic!("{at}: {line}"));
                command.text = format!("{}\n{more}", command.text);
            }
            steps.push(Step {
                command,
                prints: Vec::new(),
            });
            continue;
        }
        let first = line.split(' ').next().unwrap_or_default();
        let is_prompt = first.len() > 1 && first.ends_with(['#', '$', '%', '>']);
        assert!(!is_prompt, "{at}: an unknown prompt: {line}");
        let step = steps.last_mut();
        let step = step.unwrap_or_else(|| panic!("{at}: a block begins with a prompt"));
        step.prints.push((*line).to_owned());
    }
    assert!(!steps.is_empty(), "{at}: a block without commands");
    steps
}

impl Block {
    /// Its commands.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        match &self.body {
            Body::Console(steps) => steps,
            Body::File(_) => &[],
        }
    }

    /// The file that has it run, if it is not run where pages are followed, and in which form.
    #[must_use]
    pub fn run_by(&self) -> Option<(&str, Option<&str>)> {
        self.notes.iter().find_map(|note| match note {
            Note::RunBy(file, form) => Some((&file[..], form.as_deref())),
            _ => None,
        })
    }
}

impl Page {
    /// Whether it has commands that are run where pages are followed.
    #[must_use]
    pub fn is_to_follow(&self) -> bool {
        let runs = |block: &Block| !block.steps().is_empty() && block.run_by().is_none();
        self.blocks.iter().any(runs)
    }

    /// The links of its text, with their lines: what is in the brackets behind `]`.
    #[must_use]
    pub fn links(&self) -> Vec<(usize, String)> {
        let mut links = Vec::new();
        for (number, line) in &self.prose {
            for part in line.split("](").skip(1) {
                let target = part.split(')').next().unwrap_or_default();
                links.push((*number, target.to_owned()));
            }
        }
        links
    }

    /// What its headings can be reached by.
    #[must_use]
    pub fn anchors(&self) -> Vec<String> {
        let mut anchors: Vec<String> = Vec::new();
        for (_, line) in &self.prose {
            let Some(heading) = line.strip_prefix('#') else {
                continue;
            };
            let heading = heading.trim_start_matches('#').trim();
            let is_kept = |sign: &char| sign.is_alphanumeric() || " -_".contains(*sign);
            let plain: String = heading.to_lowercase().chars().filter(is_kept).collect();
            let plain = plain.replace(' ', "-");
            let same = anchors.iter().filter(|anchor| **anchor == plain).count();
            anchors.push(match same {
                0 => plain,
                // As many as there were before.
                same => format!("{plain}-{same}"),
            });
        }
        anchors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# A page\n\nSee [there](other.md#a-page) and [here](#a-page).\n\n\
        <!-- first: hv1# touch a -->\n<!-- exit 5 -->\n```console\n$ one \\\n  two\nsaid\nhv2# three\n```\n\
        <!-- file: ~/x.toml -->\n```toml\na = 1\n```\n\n```text\n$ nothing\n```\n";

    #[test]
    fn a_page_has_commands_files_links_and_anchors() {
        let page = parse("page.md", TEXT);
        let [console, file] = &page.blocks[..] else {
            panic!("{page:?}");
        };
        assert_eq!(console.line, 7);
        assert_eq!(console.notes.len(), 2);
        let [first, second] = console.steps() else {
            panic!("{console:?}");
        };
        assert_eq!(first.command.text, "one \\\n  two");
        assert_eq!(first.prints, ["said"]);
        assert_eq!(second.command.place, Place::Host("hv2".to_owned()));
        assert!(matches!(&file.body, Body::File(text) if text == "a = 1\n"));
        assert_eq!(page.anchors(), ["a-page"]);
        let links: Vec<String> = page.links().into_iter().map(|(_, link)| link).collect();
        assert_eq!(links, ["other.md#a-page", "#a-page"]);
        assert!(page.is_to_follow());
    }

    #[test]
    fn a_prompt_that_nobody_has_and_a_note_that_says_nothing_are_failures() {
        for text in [
            "```console\nhv9# ls\n```\n",
            "```console\nsaid\n```\n",
            "<!-- perhaps -->\n```console\n$ ls\n```\n",
        ] {
            let parsed = std::panic::catch_unwind(|| parse("page.md", text));
            assert!(parsed.is_err(), "{text}");
        }
    }
}
