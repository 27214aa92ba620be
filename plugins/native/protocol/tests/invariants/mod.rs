//! What holds of any bytes that a peer sends; for the test with random bytes and for the fuzzer.

use bytes::Bytes;
use dl_inference_grpc::{
    Authorities, Budget, Charge, Code, Deframer, Encoding, Failure, Frame, Timeouts, check_header_bytes, check_headers,
    decode_binary, encode_binary, is_reserved, status_headers, status_of, timeout_of,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

const LIMIT: usize = 64 << 10;
const BUDGET: usize = 1 << 20;

/// Everything that reads a peer's bytes, in turn. Returns how many of them took the bytes for good.
pub fn check(bytes: &[u8]) -> usize {
    let taken = [frames(bytes), compressed(bytes), headers(bytes), status(bytes), timeout(bytes)];
    authorities(bytes);
    taken.into_iter().filter(|taken| *taken).count()
}

/// The pieces of `bytes`, whose sizes the bytes themselves say.
fn pieces(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let size = 1 + usize::from(*rest.first()?) % 17;
        let (piece, left) = rest.split_at(size.min(rest.len()));
        rest = left;
        Some(piece)
    })
}

fn at_once<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("it waits"),
    }
}

/// The messages in `pieces`, and the failure after them; their memory is given back.
fn deframed<'a>(encoding: &Encoding, pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Bytes>, Option<(Code, String)>) {
    let budget = Budget::new(BUDGET);
    let mut deframer = Deframer::new(LIMIT, Code::INVALID_ARGUMENT, Charge::new(&budget));
    let (mut messages, mut failure) = (vec![], None);
    for piece in pieces {
        failure = deframer.push(Bytes::copy_from_slice(piece)).err();
        while failure.is_none() {
            match deframer.next_message() {
                Ok(None) => break,
                Ok(Some(message)) => match at_once(message.unpack(encoding, LIMIT, async || {})) {
                    Ok(frame) => messages.push(frame.message()),
                    Err(refused) => failure = Some(refused),
                },
                Err(refused) => failure = Some(refused),
            }
        }
        if failure.is_some() {
            break;
        }
    }
    drop(deframer);
    assert_eq!(budget.used(), 0, "the messages are dropped, and what came of others too");
    (messages, failure.map(|failure| (failure.code, failure.message)))
}

/// Messages do not depend on how they are cut.
fn frames(bytes: &[u8]) -> bool {
    let whole = deframed(&Encoding::Gzip, [bytes].into_iter());
    assert_eq!(deframed(&Encoding::Gzip, pieces(bytes)), whole);
    assert!(whole.0.iter().all(|message| message.len() <= LIMIT));
    !whole.0.is_empty()
}

/// No more memory is taken than the limit has room for, and what is unpacked is a whole frame.
fn compressed(bytes: &[u8]) -> bool {
    [Encoding::Gzip, Encoding::Deflate].into_iter().any(|encoding| {
        let mut held = 0;
        let count = |more| {
            held += more;
            Ok(())
        };
        let unpacked = at_once(encoding.unpack(bytes, LIMIT, Code::INVALID_ARGUMENT, count, async || {}));
        assert!(held <= bytes.len() * 1100 + 3 * LIMIT, "{held}");
        match unpacked {
            Ok(frame) => {
                let size = u32::from_be_bytes(frame[1..5].try_into().unwrap());
                assert_eq!((frame[0], size as usize), (0, frame.len() - 5));
                assert!(frame.len() <= LIMIT + 5);
                true
            }
            Err(failure) => {
                assert!(matches!(failure.code, Code::INVALID_ARGUMENT | Code::RESOURCE_EXHAUSTED));
                false
            }
        }
    })
}

/// Lines of names and values, as far as HTTP has room for them.
fn header_map(bytes: &[u8]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for line in bytes.split(|byte| *byte == b'\n').take(1000) {
        let at = line.iter().position(|byte| *byte == b'=').unwrap_or(line.len());
        let value = line.get(at + 1..).unwrap_or_default();
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(&line[..at]), HeaderValue::from_bytes(value)) {
            headers.append(name, value);
        }
    }
    headers
}

/// Headers that are let in are small, and their binary values can be read.
fn headers(bytes: &[u8]) -> bool {
    let headers = header_map(bytes);
    let Ok(has_metadata) = check_headers(&headers, 2000) else { return false };
    assert!(check_header_bytes(&headers, 2000).is_ok());
    let own: Vec<_> = headers.iter().filter(|(name, _)| !is_reserved(name.as_str(), false)).collect();
    assert_eq!(has_metadata, !own.is_empty());
    for (_, value) in own.into_iter().filter(|(name, _)| name.as_str().ends_with("-bin")) {
        for decoded in decode_binary(value.as_bytes()) {
            assert_eq!(decode_binary(encode_binary(&decoded).as_bytes()).collect::<Vec<_>>(), [decoded]);
        }
    }
    true
}

/// A status is passed on as it came.
fn status(bytes: &[u8]) -> bool {
    match status_of(StatusCode::OK, header_map(bytes)) {
        Ok(_) => true,
        Err(Failure { code, message, .. }) => {
            assert!(code.0 != 0 && code.0 <= 16, "{code:?}");
            let again = status_of(StatusCode::OK, status_headers(Failure::new(code, message.clone()))).unwrap_err();
            assert_eq!((again.code, again.message), (code, message));
            false
        }
    }
}

/// A timeout is passed on as at least itself, and a hundredth more at most.
fn timeout(bytes: &[u8]) -> bool {
    let Ok(value) = HeaderValue::from_bytes(bytes) else { return false };
    let read = |value| timeout_of(&HeaderMap::from_iter([(HeaderName::from_static("grpc-timeout"), value)]));
    let Ok(Some(given)) = read(value) else { return false };
    let longest = Duration::from_secs(99_900_000);
    let passed_on = read(Timeouts::default().header(given)).unwrap().unwrap();
    assert!(passed_on >= given.min(longest) && passed_on <= given + given / 100 + Duration::from_micros(1));
    true
}

/// Authorities are changed in their place, and do not depend on how the bytes are cut.
fn authorities(bytes: &[u8]) {
    let mut whole = bytes.to_vec();
    Authorities::default().pass(&mut whole);
    let mut cut = bytes.to_vec();
    let sizes: Vec<_> = pieces(bytes).map(<[u8]>::len).collect();
    let (mut authorities, mut rest) = (Authorities::default(), &mut cut[..]);
    for size in sizes {
        let (piece, left) = rest.split_at_mut(size);
        authorities.pass(piece);
        rest = left;
    }
    assert_eq!(cut, whole);
    for (before, after) in bytes.iter().zip(&whole) {
        assert!(before == after || *after == b'-' && b"%:[]".contains(before));
    }
}

/// A whole frame of `message`; to begin with.
#[allow(dead_code)] // the fuzzer begins with nothing
pub fn frame_of(message: &[u8]) -> Bytes {
    let built = Frame::build(message.len(), Charge::new(&Budget::new(BUDGET)), |place| {
        place.copy_from_slice(message);
        Ok::<(), Failure>(())
    });
    built.unwrap().bytes().clone()
}
