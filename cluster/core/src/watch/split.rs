//! Bodies of answers, as they arrive in pieces, cut into events (one a line) and into the items of a list, so that memory holds one
//! object and not one answer. Knows JSON's brackets and strings, and nothing of what is in them.

/// One object. etcd refuses requests above 1.5 MiB; what is there may be larger as JSON, and larger where an operator raised that.
pub(super) const MAX_OBJECT: usize = 8 << 20;

/// A list without its items: kind, resourceVersion, a continue token of some hundred bytes.
const MAX_ENVELOPE: usize = 64 << 10;

/// What was cut out.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece<'b> {
    /// A line, or an item, whole.
    Whole(&'b [u8]),
    /// One of more than [`MAX_OBJECT`] bytes, which are dropped.
    TooLarge,
}

/// Lines. What stands after the last line's end when the body ends is half an event, and no event.
#[derive(Debug, Default)]
pub(super) struct Lines {
    begun: Vec<u8>,
    dropping: bool,
}

impl Lines {
    /// Takes the next bytes of the body; gives every line that ends in them.
    pub(super) fn push(&mut self, mut bytes: &[u8], mut give: impl FnMut(Piece<'_>)) {
        while let Some(end) = bytes.iter().position(|b| *b == b'\n') {
            let (line, rest) = (&bytes[..end], &bytes[end + 1..]);
            bytes = rest;
            if self.dropping || self.begun.len() + line.len() > MAX_OBJECT {
                (self.dropping, self.begun) = (false, Vec::new());
                give(Piece::TooLarge);
            } else if self.begun.is_empty() {
                give_line(line, &mut give);
            } else {
                self.begun.extend_from_slice(line);
                give_line(&self.begun, &mut give);
                self.begun.clear();
                // One huge object must not hold its memory as long as the stream lives.
                self.begun.shrink_to(64 << 10);
            }
        }
        if self.begun.len() + bytes.len() > MAX_OBJECT {
            (self.dropping, self.begun) = (true, Vec::new());
        }
        if !self.dropping {
            self.begun.extend_from_slice(bytes);
        }
    }
}

fn give_line(line: &[u8], give: &mut impl FnMut(Piece<'_>)) {
    if !line.trim_ascii().is_empty() {
        give(Piece::Whole(line));
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Outside of the items.
    Envelope,
    /// Between two items.
    Items,
    /// In one.
    Item,
}

/// The items of a list (`{"kind": …, "metadata": …, "items": [ … ]}`), and the list without them.
#[derive(Debug)]
pub(super) struct Items {
    place: Place,
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// Where the last string of the envelope begins, after its quote.
    string_at: usize,
    /// The string that was last closed is the key `items`, and nothing but a colon has come since.
    at_items: bool,
    envelope: Vec<u8>,
    item: Vec<u8>,
    dropping: bool,
    /// The body is no list.
    wrong: bool,
}

impl Default for Items {
    fn default() -> Self {
        Self {
            place: Place::Envelope,
            depth: 0,
            in_string: false,
            escaped: false,
            string_at: 0,
            at_items: false,
            envelope: Vec::new(),
            item: Vec::new(),
            dropping: false,
            wrong: false,
        }
    }
}

impl Items {
    /// Takes the next bytes of the body; gives every item that ends in them.
    pub(super) fn push(&mut self, bytes: &[u8], mut give: impl FnMut(Piece<'_>)) {
        for &byte in bytes {
            match self.place {
                Place::Envelope => self.envelope(byte),
                Place::Items => self.between(byte),
                Place::Item => self.item(byte, &mut give),
            }
        }
    }

    /// The list without its items, once it has ended; `None`: it is no list, or half of one.
    pub(super) fn envelope_of(&self) -> Option<&[u8]> {
        let ended = self.place == Place::Envelope && self.depth == 0 && !self.envelope.is_empty();
        (ended && !self.wrong).then_some(&self.envelope)
    }

    fn envelope(&mut self, byte: u8) {
        if self.envelope.len() == MAX_ENVELOPE {
            self.wrong = true;
            return;
        }
        self.envelope.push(byte);
        if self.in_string {
            if self.string_ends(byte) {
                let string = &self.envelope[self.string_at..self.envelope.len() - 1];
                self.at_items = self.depth == 1 && string == b"items";
            }
            return;
        }
        match byte {
            b'"' => {
                self.in_string = true;
                self.string_at = self.envelope.len();
            }
            b'[' if self.at_items => {
                self.at_items = false;
                self.place = Place::Items;
            }
            b'{' | b'[' => {
                self.depth += 1;
                self.at_items = false;
            }
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                self.at_items = false;
            }
            b':' | b' ' | b'\t' | b'\r' | b'\n' => {}
            _ => self.at_items = false,
        }
    }

    fn between(&mut self, byte: u8) {
        match byte {
            b'{' => {
                self.place = Place::Item;
                self.depth = 1;
                self.dropping = false;
                self.item.clear();
                self.item.push(byte);
            }
            b']' => {
                self.envelope.push(byte);
                self.place = Place::Envelope;
                self.depth = 1;
            }
            b',' | b' ' | b'\t' | b'\r' | b'\n' => {}
            _ => self.wrong = true,
        }
    }

    fn item(&mut self, byte: u8, give: &mut impl FnMut(Piece<'_>)) {
        if self.item.len() == MAX_OBJECT {
            (self.dropping, self.item) = (true, Vec::new());
        }
        if !self.dropping {
            self.item.push(byte);
        }
        if self.in_string {
            self.string_ends(byte);
            return;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth -= 1;
                if self.depth == 0 {
                    give(if self.dropping {
                        Piece::TooLarge
                    } else {
                        Piece::Whole(&self.item)
                    });
                    self.place = Place::Items;
                }
            }
            _ => {}
        }
    }

    fn string_ends(&mut self, byte: u8) -> bool {
        match byte {
            _ if self.escaped => self.escaped = false,
            b'\\' => self.escaped = true,
            b'"' => {
                self.in_string = false;
                return true;
            }
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines_of(chunks: &[&[u8]]) -> Vec<Option<Vec<u8>>> {
        let (mut lines, mut got) = (Lines::default(), Vec::new());
        for chunk in chunks {
            lines.push(chunk, |piece| match piece {
                Piece::Whole(line) => got.push(Some(line.to_vec())),
                Piece::TooLarge => got.push(None),
            });
        }
        got
    }

    #[test]
    fn a_line_too_large_is_dropped_and_the_next_is_read() {
        let huge = vec![b'x'; MAX_OBJECT + 1];
        let got = lines_of(&[
            b"a\n",
            &huge[..MAX_OBJECT / 2],
            &huge[MAX_OBJECT / 2..],
            b"x\nb\n\n",
            b"half",
        ]);
        assert_eq!(got, [Some(b"a".to_vec()), None, Some(b"b".to_vec())]);
    }

    fn items_of(text: &str, cut: usize) -> (Vec<serde_json::Value>, Option<serde_json::Value>) {
        let (mut items, mut got) = (Items::default(), Vec::new());
        for chunk in text.as_bytes().chunks(cut.max(1)) {
            items.push(chunk, |piece| {
                let Piece::Whole(json) = piece else {
                    panic!("too large")
                };
                got.push(serde_json::from_slice(json).expect("an item"));
            });
        }
        let envelope = items
            .envelope_of()
            .map(|json| serde_json::from_slice(json).expect("an envelope"));
        (got, envelope)
    }

    #[test]
    fn only_the_outermost_items_are_items() {
        let text = r#"{"kind":"items","metadata":{"items":[{"no":1}],"continue":"a\"]}"},"items" : [ {"a":"]}\\"} , {"items":[{}]} ],"more":["items"]}"#;
        for cut in 1..text.len() {
            let (items, envelope) = items_of(text, cut);
            assert_eq!(
                items,
                [
                    serde_json::json!({"a": "]}\\"}),
                    serde_json::json!({"items": [{}]})
                ]
            );
            let envelope = envelope.expect("a list");
            assert_eq!(envelope["metadata"]["continue"], "a\"]}");
            assert_eq!(envelope["items"], serde_json::json!([]));
        }
        assert_eq!(items_of(r#"{"items":null,"metadata":{}}"#, 3).0.len(), 0);
        assert!(items_of(r#"{"items":[1]}"#, 3).1.is_none());
        for cut in 1..text.len() {
            assert!(
                items_of(&text[..cut], 7).1.is_none(),
                "half a list is none: {cut}"
            );
        }
    }

    proptest! {
        #[test]
        fn lines_are_the_same_however_they_are_cut(text in "[ab\\n]{0,60}", cuts in prop::collection::vec(1_usize..7, 0..40)) {
            let (mut rest, mut chunks) = (text.as_bytes(), Vec::new());
            for cut in cuts {
                let (chunk, tail) = rest.split_at(cut.min(rest.len()));
                chunks.push(chunk);
                rest = tail;
            }
            chunks.push(rest);
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            let naive: Vec<_> = whole.split('\n').filter(|l| !l.is_empty()).map(|l| Some(l.as_bytes().to_vec())).collect();
            prop_assert_eq!(lines_of(&chunks), naive);
        }
    }
}
