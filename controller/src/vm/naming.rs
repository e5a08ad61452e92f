//! Names for a clone's files: after the new VM, and never one that is taken.

use std::collections::BTreeSet;

use kvm_clone_protocol::PARTIAL_SUFFIX;

const OVERLAY_SUFFIX: &str = ".kc-overlay";

/// The name for a copy of `file`, a disk of the VM `old` that becomes `new`: the old name in it
/// gives way to the new one; where it does not occur, the new one goes in front. A VM that keeps
/// its name keeps its files' names.
pub(super) fn for_copy(file: &str, old: &str, new: &str) -> String {
    if old == new {
        file.to_owned()
    } else if let Some(at) = word_at(file, old) {
        format!("{}{new}{}", &file[..at], &file[at + old.len()..])
    } else {
        format!("{new}-{file}")
    }
}

/// Where `word` stands in `text` with no letter or digit beside it.
fn word_at(text: &str, word: &str) -> Option<usize> {
    let beside = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    text.match_indices(word)
        .map(|(at, _)| at)
        .find(|at| {
            let (before, after) = (&text[..*at], &text[at + word.len()..]);
            !beside(before.chars().next_back()) && !beside(after.chars().next())
        })
        .filter(|_| !word.is_empty())
}

/// The first of `name`, `name-1`, … (a number goes before the extension) that nothing in the
/// directory has, under which nothing is being written, and that was not given out before.
pub(super) fn free(name: &str, taken: &BTreeSet<String>) -> String {
    let is_free = |name: &String| !taken.contains(name) && !taken.contains(&partial(name));
    let (stem, extension) = match name.rsplit_once('.') {
        Some((stem, extension)) if !stem.is_empty() => (stem, format!(".{extension}")),
        _ => (name, String::new()),
    };
    std::iter::once(name.to_owned())
        .chain((1..).map(|number: u32| format!("{stem}-{number}{extension}")))
        .find(is_free)
        .expect("the numbers are more than the files in a directory")
}

/// The name for a copy in another format: what names the old one at its end gives way.
pub(super) fn in_format(file: &str, old: &str, new: &str) -> String {
    let stem = file.strip_suffix(old).filter(|stem| stem.ends_with('.'));
    match stem {
        Some(stem) if old != new => format!("{stem}{new}"),
        _ => file.to_owned(),
    }
}

/// The name that a file has until it is complete.
pub(super) fn partial(name: &str) -> String {
    format!(".{name}{PARTIAL_SUFFIX}")
}

/// The name that a file has while changes that were committed are put into it.
pub(super) fn applying(name: &str) -> String {
    format!(".{name}.kc-applying")
}

/// The name of what takes the changes to an image until they are whole.
pub(super) fn overlay(name: &str) -> String {
    format!(".{name}{OVERLAY_SUFFIX}")
}

/// Directory and name of an absolute path.
pub(super) fn split(path: &str) -> (&str, &str) {
    match path.rsplit_once('/') {
        Some(("", name)) => ("/", name),
        Some((directory, name)) => (directory, name),
        None => ("/", path),
    }
}

/// A name in a directory.
pub(super) fn join(directory: &str, name: &str) -> String {
    format!("{}/{name}", directory.trim_end_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_new_name_takes_the_place_of_the_old() {
        for (file, expected) in [
            ("web.qcow2", "web-test.qcow2"),
            ("web-data.raw", "web-test-data.raw"),
            ("disk_of_web", "disk_of_web-test"),
            ("webserver.qcow2", "web-test-webserver.qcow2"),
            ("root.img", "web-test-root.img"),
        ] {
            assert_eq!(for_copy(file, "web", "web-test"), expected);
        }
        assert_eq!(for_copy("root.img", "web", "web"), "root.img");
    }

    #[test]
    fn a_name_that_is_taken_gets_a_number() {
        let taken = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(free("a.raw", &taken(&[])), "a.raw");
        assert_eq!(free("a.raw", &taken(&["a.raw", "a-1.raw"])), "a-2.raw");
        assert_eq!(free("a.raw", &taken(&[".a.raw.kc-new"])), "a-1.raw");
        assert_eq!(free("disk", &taken(&["disk"])), "disk-1");
        assert_eq!(free(".hidden", &taken(&[".hidden"])), ".hidden-1");
    }

    #[test]
    fn paths_are_taken_apart_and_put_together() {
        assert_eq!(split("/a/b c"), ("/a", "b c"));
        assert_eq!(split("/a"), ("/", "a"));
        assert_eq!(join("/", "a"), "/a");
        assert_eq!(join("/x/", "a"), "/x/a");
    }
}
