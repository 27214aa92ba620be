//! The authorities of gRPC's C core that h2 refuses: of a Unix-domain socket it is the path, percent-encoded
//! ("tmp%2Fsocket"), and of several addresses all of them ("10.0.0.1:80,10.0.0.2:80"). Here each "%" of an authority, and
//! each colon after the first, becomes "-" before h2 sees it. Nobody reads the authority of a call.

/// The bytes before a client's first frame.
const PREFACE: usize = 24;
const FRAME_HEAD: usize = 9;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const PADDED: u8 = 8;
const PRIORITY: u8 = 0x20;
/// Of the fields of a stream's priority.
const PRIORITY_BYTES: usize = 5;
const NAME: &[u8] = b":authority";
/// The number of that name in HPACK's static table.
const NUMBER: u8 = 1;

/// Passes over a client's bytes as they come, and changes authorities.
#[derive(Debug, Default)]
pub struct Authorities {
    preface: usize,
    head: [u8; FRAME_HEAD],
    in_head: usize,
    /// Of the frame's payload: bytes to come; and how many of the next ones are not the header block's.
    payload: usize,
    passed_over: usize,
    /// Whether the next byte of the payload is the length of its padding.
    padding_next: bool,
    padding: usize,
    block: Block,
}

/// Where in a header block the next byte stands (RFC 7541, section 6).
#[derive(Debug, Default, Clone, Copy)]
enum Block {
    #[default]
    Field,
    /// In an integer of several bytes; what follows it.
    Integer(After),
    Name,
    Value {
        is_authority: bool,
    },
    /// In a string: bytes to come, and how many of the name's have been equal.
    InName {
        left: usize,
        equal: Option<usize>,
    },
    InValue {
        left: usize,
        authority: Option<Seen>,
    },
    /// In the length of a string of 127 bytes or more: the value so far, and its shift.
    Length {
        so_far: usize,
        shift: u32,
        of: Of,
    },
}

/// What a string is.
#[derive(Debug, Clone, Copy)]
enum Of {
    Name,
    Value(Option<Seen>),
}

/// Where in an authority the next byte stands.
#[derive(Debug, Clone, Copy)]
enum Seen {
    Host,
    Brackets,
    Port,
}

impl Seen {
    fn next(self, byte: &mut u8) -> Seen {
        match (self, *byte) {
            (Seen::Host, b'[') => return Seen::Brackets,
            (Seen::Host, b':') => return Seen::Port,
            (Seen::Brackets, b']') => return Seen::Host,
            (Seen::Port, b':' | b'[' | b']') | (_, b'%') => *byte = b'-',
            _ => {}
        }
        self
    }
}

#[derive(Debug, Clone, Copy)]
enum After {
    Field,
    Value,
}

impl Authorities {
    /// `bytes` are the next ones of the connection.
    pub fn pass(&mut self, bytes: &mut [u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let passed = if self.preface < PREFACE {
                self.preface += 1;
                1
            } else if self.payload == 0 {
                self.take_head(rest)
            } else if self.passed_over > 0 && !self.padding_next {
                self.pass_over(rest.len())
            } else if let Some(passed) = self.pass_string(rest.len()) {
                passed
            } else {
                self.payload -= 1;
                if let Some(first) = rest.first_mut() {
                    self.take_payload(first);
                }
                1
            };
            rest = rest.get_mut(passed..).unwrap_or_default();
        }
    }

    /// Passes over what is not the header block's, of `most` bytes; returns how many those were.
    fn pass_over(&mut self, most: usize) -> usize {
        let passed = self.passed_over.min(self.payload).min(most);
        self.payload -= passed;
        self.passed_over = if self.payload == 0 { 0 } else { self.passed_over - passed };
        passed
    }

    /// Passes over a string that is not an authority, of `most` bytes; returns how many those were, if any.
    fn pass_string(&mut self, most: usize) -> Option<usize> {
        let Block::InValue { left, authority: None } = &mut self.block else { return None };
        let passed = (*left - 1).min(most).min(self.payload.checked_sub(self.padding)?);
        if self.padding_next || passed == 0 {
            return None;
        }
        *left -= passed;
        self.payload -= passed;
        Some(passed)
    }

    /// Takes as much of a frame's head as there is; returns how many bytes those were.
    fn take_head(&mut self, bytes: &[u8]) -> usize {
        let missing = self.head.get_mut(self.in_head..).unwrap_or_default();
        let taken = missing.len().min(bytes.len());
        missing.iter_mut().zip(bytes).for_each(|(place, byte)| *place = *byte);
        self.in_head += taken;
        if self.in_head < FRAME_HEAD {
            return taken;
        }
        self.in_head = 0;
        let [a, b, c, kind, flags, ..] = self.head;
        self.payload = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        self.padding_next = kind == HEADERS && flags & PADDED != 0;
        self.padding = 0;
        self.passed_over = match kind {
            HEADERS if flags & PRIORITY != 0 => PRIORITY_BYTES,
            HEADERS | CONTINUATION => 0,
            _ => self.payload,
        };
        if kind == HEADERS {
            self.block = Block::Field;
        }
        taken
    }

    fn take_payload(&mut self, byte: &mut u8) {
        if self.padding_next {
            self.padding_next = false;
            self.padding = usize::from(*byte);
        } else if self.payload >= self.padding {
            self.block = self.block.next(byte);
        }
    }
}

impl Block {
    fn next(self, byte: &mut u8) -> Block {
        match self {
            Block::Field => Block::of_field(*byte),
            Block::Integer(after) if *byte & 0x80 != 0 => Block::Integer(after),
            Block::Integer(After::Field) => Block::Field,
            Block::Integer(After::Value) => Block::Value { is_authority: false },
            Block::Name => match usize::from(*byte & 0x7f) {
                127 => Block::Length { so_far: 127, shift: 0, of: Of::Name },
                0 => Block::Value { is_authority: false },
                left => Block::InName { left, equal: (*byte & 0x80 == 0).then_some(0) },
            },
            Block::InName { left, equal } => {
                let equal = equal.filter(|at| NAME.get(*at) == Some(byte)).map(|at| at + 1);
                match left {
                    1 => Block::Value { is_authority: equal == Some(NAME.len()) },
                    _ => Block::InName { left: left - 1, equal },
                }
            }
            Block::Value { is_authority } => {
                let authority = (is_authority && *byte & 0x80 == 0).then_some(Seen::Host);
                match usize::from(*byte & 0x7f) {
                    127 => Block::Length { so_far: 127, shift: 0, of: Of::Value(authority) },
                    0 => Block::Field,
                    left => Block::InValue { left, authority },
                }
            }
            Block::InValue { left, authority } => {
                let authority = authority.map(|seen| seen.next(byte));
                if left == 1 { Block::Field } else { Block::InValue { left: left - 1, authority } }
            }
            Block::Length { so_far, shift, of } => {
                let so_far = so_far.saturating_add(usize::from(*byte & 0x7f).checked_shl(shift).unwrap_or(usize::MAX));
                match of {
                    _ if *byte & 0x80 != 0 => Block::Length { so_far, shift: shift + 7, of },
                    Of::Name => Block::InName { left: so_far, equal: None },
                    Of::Value(authority) => Block::InValue { left: so_far, authority },
                }
            }
        }
    }

    fn of_field(byte: u8) -> Block {
        let (number, most) = match byte {
            0x80.. => return if byte == 0xff { Block::Integer(After::Field) } else { Block::Field },
            0x40.. => (byte & 0x3f, 0x3f),
            0x20.. => return if byte & 0x1f == 0x1f { Block::Integer(After::Field) } else { Block::Field },
            _ => (byte & 0x0f, 0x0f),
        };
        match number {
            0 => Block::Name,
            number if number == most => Block::Integer(After::Value),
            number => Block::Value { is_authority: number == NUMBER },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let size = (payload.len() as u32).to_be_bytes();
        [&size[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    fn literal(first: u8, name: &[u8], value: &[u8]) -> Vec<u8> {
        let named = if first & 0x0f == 0 { [&[name.len() as u8], name].concat() } else { vec![] };
        [&[first], &named[..], &[value.len() as u8], value].concat()
    }

    /// What comes of frames, in pieces of each size.
    fn passed(frames: &[Vec<u8>]) -> Vec<u8> {
        let all = [&[b'P'; PREFACE][..], &frames.concat()].concat();
        let mut outcomes: Vec<Vec<u8>> = (1..all.len())
            .map(|size| {
                let mut changed = all.clone();
                let mut authorities = Authorities::default();
                changed.chunks_mut(size).for_each(|piece| authorities.pass(piece));
                changed.split_off(PREFACE)
            })
            .collect();
        outcomes.dedup();
        assert_eq!(outcomes.len(), 1, "the pieces made a difference");
        outcomes.remove(0)
    }

    #[test]
    fn an_authority_loses_its_percents_and_nothing_else_changes() {
        let path = literal(0x40, b":path", b"/a%2Fb");
        let long = [&[0x40, 0x7f, 0x05][..], &[b'n'; 132], &[0x7f, 0x80, 0x01], &[b'%'; 255]].concat();
        let rest =
            [&path[..], &[0x83, 0xff, 0x80, 0x01, 0x3f, 0x02], &long, &literal(0x0f, b"", b"")[..1], &[0x30, 1, b'%']];
        for first in [0x40, 0x00, 0x10, 0x41, 0x01, 0x11] {
            let block = |value| [&rest.concat()[..], &literal(first, NAME, value), &path].concat();
            let (before, after) = (block(b"tmp%2Fx%2Fy"), block(b"tmp-2Fx-2Fy"));
            let around = |block: &[u8]| [frame(4, 0, b"%%%%%%"), frame(HEADERS, 4, block), frame(0, 1, b"\x41\x01%")];
            assert_eq!(passed(&around(&before)), around(&after).concat());
        }
    }

    #[test]
    fn one_port_stays() {
        for (before, after) in [
            (&b"10.0.0.1:80,10.0.0.2:80"[..], &b"10.0.0.1:80,10.0.0.2-80"[..]),
            (b"localhost:80", b"localhost:80"),
            (b"[::1]:80,[::2]:80", b"[::1]:80,---2--80"),
        ] {
            let frames = |value| [frame(HEADERS, 4, &literal(0x41, NAME, value))];
            assert_eq!(passed(&frames(before)), frames(after).concat());
        }
    }

    #[test]
    fn a_long_authority_changes_too() {
        let block = |value: u8| [&[0x41, 0x7f, 0x81, 0x01][..], &[value; 127 + 129]].concat();
        let frames = |value| [frame(HEADERS, 4, &[block(value), literal(0x40, b":path", b"%")].concat())];
        assert_eq!(passed(&frames(b'%')), frames(b'-').concat());
    }

    #[test]
    fn padding_priority_and_continuations_are_minded() {
        let block = |value: &[u8]| literal(0x41, NAME, value);
        let frames = |value: &[u8]| {
            let padded = [&[3][..], b"%%%%%", &block(value), b"\x41\x01%"].concat();
            let (begun, rest) = (block(value)[..4].to_vec(), block(value)[4..].to_vec());
            [frame(HEADERS, PADDED | PRIORITY | 4, &padded), frame(HEADERS, 0, &begun), frame(CONTINUATION, 4, &rest)]
        };
        assert_eq!(passed(&frames(b"a%2Fb")), frames(b"a-2Fb").concat());
    }

    #[test]
    fn what_is_coded_by_huffman_stays() {
        let block = [0x41, 0x83, b'%', b'%', b'%'];
        let frames = [frame(HEADERS, 4, &block)];
        assert_eq!(passed(&frames), frames.concat());
    }
}
