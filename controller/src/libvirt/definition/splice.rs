//! Changes of XML text by byte range, so that whatever is not changed stays as it was, to the
//! byte: quotes, white space, comments, order.

use std::ops::Range;

use roxmltree::{Attribute, Node};

/// Changes of one text, to be made at once.
#[derive(Debug)]
pub(super) struct Splices<'a> {
    text: &'a str,
    changes: Vec<(Range<usize>, String)>,
}

impl<'a> Splices<'a> {
    pub(super) fn of(text: &'a str) -> Self {
        Self {
            text,
            changes: Vec::new(),
        }
    }

    /// The text with all changes. Those at one place stand in the order in which they were asked
    /// for; one within another, such as of a value in an element that goes, is lost with it.
    pub(super) fn apply(mut self) -> String {
        self.changes
            .sort_by_key(|(range, _)| (range.start, std::cmp::Reverse(range.end)));
        let (mut result, mut at) = (String::with_capacity(self.text.len() + 256), 0);
        for (range, new) in &self.changes {
            if range.start < at {
                continue;
            }
            result.push_str(&self.text[at..range.start]);
            result.push_str(new);
            at = range.end;
        }
        result.push_str(&self.text[at..]);
        result
    }

    fn change(&mut self, range: Range<usize>, new: impl Into<String>) {
        self.changes.push((range, new.into()));
    }

    /// Gives an attribute another value.
    pub(super) fn set_value(&mut self, attribute: &Attribute<'_, '_>, value: &str) {
        let range = attribute.range_value();
        let quote = self.text.as_bytes()[range.start - 1];
        self.change(range, escape(value, Some(char::from(quote))));
    }

    /// Puts other attributes in the place of one: text that is ready to stand there.
    pub(super) fn replace_attribute(&mut self, attribute: &Attribute<'_, '_>, text: &str) {
        self.change(attribute.range(), text);
    }

    /// Takes an attribute away, with the white space before it.
    pub(super) fn remove_attribute(&mut self, attribute: &Attribute<'_, '_>) {
        let range = attribute.range();
        self.change(self.before(range.start)..range.end, "");
    }

    /// Gives an element this text as its whole content.
    pub(super) fn set_text(&mut self, node: Node<'_, '_>, value: &str) {
        let escaped = escape(value, None);
        let (range, name) = (node.range(), node.tag_name().name());
        let element = &self.text[range.clone()];
        if let Some(open) = element.strip_suffix("/>") {
            let end = range.start + open.trim_end().len();
            self.change(end..range.end, format!(">{escaped}</{name}>"));
            return;
        }
        // Up to the end tag, and not to the last child's end: the parser gives text that changes
        // to CDATA and back as one node, with the place of its first piece.
        let end = range.start + element.rfind("</").unwrap_or(element.len());
        let start = node.first_child().map_or(end, |first| first.range().start);
        self.change(start..end, escaped);
    }

    /// Takes an element away, with the line that it stands on if nothing else does.
    pub(super) fn remove(&mut self, node: Node<'_, '_>) {
        let range = node.range();
        self.change(self.before(range.start)..range.end, "");
    }

    /// Puts an element in front of another, on a line of its own if that one has one.
    pub(super) fn insert_before(&mut self, node: Node<'_, '_>, element: &str) {
        let start = node.range().start;
        let space = &self.text[self.before(start)..start];
        self.change(start..start, format!("{element}{space}"));
    }

    /// Puts an element behind another, on a line of its own if that one has one.
    pub(super) fn insert_after(&mut self, node: Node<'_, '_>, element: &str) {
        let range = node.range();
        let space = &self.text[self.before(range.start)..range.start];
        self.change(range.end..range.end, format!("{space}{element}"));
    }

    /// Where the white space ahead of a place begins: at most the end of the line before.
    fn before(&self, at: usize) -> usize {
        let ahead = &self.text[..at];
        let line = ahead.trim_end_matches([' ', '\t']);
        let broken = line.strip_suffix('\n').unwrap_or(line);
        broken.strip_suffix('\r').unwrap_or(broken).len()
    }
}

/// A value as XML text; in an attribute, between quotes of this kind.
pub(in crate::libvirt) fn escape(value: &str, quote: Option<char>) -> String {
    let mut escaped = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\r' => escaped.push_str("&#13;"),
            // An attribute's white space would be read as spaces.
            '\n' if quote.is_some() => escaped.push_str("&#10;"),
            '\t' if quote.is_some() => escaped.push_str("&#9;"),
            '"' if quote == Some('"') => escaped.push_str("&quot;"),
            '\'' if quote == Some('\'') => escaped.push_str("&apos;"),
            other => escaped.push(other),
        }
    }
    escaped
}
