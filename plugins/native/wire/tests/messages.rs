//! Messages that are read and written here, and those that are left to the reference.

mod damage;
mod invariants;

use damage::Random;
use dl_inference_wire::key::Tag;
use dl_inference_wire::walk::{Field, Fields, Value, varint};
use dl_inference_wire::write::{Writer, fill, size};
use dl_inference_wire::{
    Dtype, Key, Model, NotPlain, Output, Version, find_key, openinference, seldon, tfserving, well_formed,
};
use invariants::{model_spec, name_and_text, task_id};

fn message(write: impl Fn(&mut Writer<'_>)) -> Vec<u8> {
    let mut out = vec![0; size(&write)];
    fill(&mut out, write);
    out
}

fn infer(id: &str, raw: &[u8]) -> Vec<u8> {
    message(|out| {
        out.text(1, "mmoe");
        out.text(3, id);
        out.message(5, |out| {
            out.text(1, "x");
            out.text(2, "FP32");
            out.message(3, |out| [1, 2].into_iter().for_each(|size| out.varint(size)));
        });
        out.bytes(7, raw);
    })
}

#[test]
fn varints_end_after_ten_bytes_at_most() {
    for (bytes, expected) in [
        (&b"\x00"[..], Ok((0, 1))),
        (b"\x96\x01", Ok((150, 2))),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", Ok((u64::MAX, 10))),
        (b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x7e", Ok((0, 10))),
        (b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00", Err(NotPlain)),
        (b"\x80", Err(NotPlain)),
        (b"", Err(NotPlain)),
    ] {
        assert_eq!(varint(bytes, 0), expected, "{bytes:?}");
    }
}

#[test]
fn fields_are_stepped_over_in_order() {
    let body = b"\x08\x07\x11\x01\0\0\0\0\0\0\0\x1a\x02ab\x25\x02\0\0\0";
    let mut fields = Fields::new(body);
    let expected =
        [(1, Value::Varint(7)), (2, Value::Fixed64(1)), (3, Value::Delimited(b"ab")), (4, Value::Fixed32(2))];
    for (number, value) in expected {
        assert_eq!(fields.next(), Ok(Some(Field { number, value })));
    }
    assert_eq!(fields.next(), Ok(None));
    assert_eq!(fields.count(), 4);
}

#[test]
fn what_protobuf_refuses_is_not_well_formed() {
    let ends_too_early = [&b"\x0a\x05ab"[..], b"\x08", b"\x09\0\0", b"\x0d\0", b"\xff", b"\x0a"];
    let groups = [&b"\x0b"[..], b"\x0c", b"\x0b\x14", b"\x0b\0\x0c"];
    for body in ends_too_early.into_iter().chain(groups).chain([&b""[..], b"\0\0", b"\x0e\0", b"\x0f\0"]) {
        assert!(!well_formed(body), "{body:?}");
    }
    assert!(well_formed(b"\x0b\x08\x01\x13\x14\x0c"));
    assert!(Fields::new(b"\x0b\x0c").next().is_err());
}

#[test]
fn an_open_inference_request_is_read() {
    let raw = [1, 2, 3, 4, 5, 6, 7, 8];
    let body = infer("7", &raw);
    let request = openinference::decode(&body).unwrap();
    assert_eq!((request.model, request.version, request.id, request.raw), ("mmoe", None, "7", true));
    let [input] = &request.inputs[..] else { panic!("{request:?}") };
    assert_eq!((input.name, input.dtype, input.shape.sizes()), ("x", Dtype::F32, &[1, 2][..]));
    assert_eq!(input.in_place(), Some(&raw[..]));
    let key = Key { model: Model::Name("mmoe"), version: Some(Version::Text("")), label: "", queueing: false };
    assert_eq!(find_key(&name_and_text(), &body), Some(key));
    let asking = [&body[..], b"\x22\x03\x0a\x01a"].concat();
    assert_eq!(find_key(&name_and_text(), &asking), Some(Key { queueing: true, ..key }));
}

#[test]
fn what_is_not_plain_is_left_to_the_reference() {
    let body = infer("7", &[0; 8]);
    for (what, odd) in [
        ("too few bytes", infer("7", &[0; 7])),
        ("a second id", [&body[..], b"\x1a\x01x"].concat()),
        ("a parameter", [&body[..], b"\x22\x03\x0a\x01a"].concat()),
        ("a group", [&body[..], b"\x9b\x06\x9c\x06"].concat()),
        ("a second raw content", [&body[..], b"\x3a\x00"].concat()),
        ("an id that is not UTF-8", [&body[..], b"\x1a\x01\xff"].concat()),
        ("a field of another type", [&body[..], b"\x08\x01"].concat()),
    ] {
        assert_eq!(openinference::decode(&odd), Err(NotPlain), "{what}");
    }
    let unknown = [&body[..], b"\x98\x06\x01"].concat();
    assert!(openinference::decode(&unknown).is_ok());
}

#[test]
fn what_takes_many_times_its_bytes_is_left_to_the_reference() {
    let outputs = |count| [infer("7", &[0; 8]), b"\x32\x00".repeat(count)].concat();
    assert!(openinference::decode(&outputs(1024)).is_ok());
    assert_eq!(openinference::decode(&outputs(1025)), Err(NotPlain));
    let varints = [infer("7", &[0; 8]), b"\x98\x06\x01".repeat(10_000)].concat();
    assert_eq!(openinference::decode(&varints), Err(NotPlain));
}

#[test]
fn the_version_of_a_model_spec_is_read_where_it_is_alone() {
    let spec = |write: &dyn Fn(&mut Writer<'_>)| {
        message(|out| {
            out.message(1, |out| {
                out.text(1, "m");
                write(out);
            });
        })
    };
    let key = |version, label| Some(Key { model: Model::Name("m"), version, label, queueing: false });
    let numbered = spec(&|out| out.message(2, |out| out.number(1, -3i64 as u64)));
    assert_eq!(find_key(&model_spec(), &numbered), key(Some(Version::Number(-3)), ""));
    assert_eq!(find_key(&model_spec(), &spec(&|out| out.bytes(2, b""))), key(Some(Version::Number(0)), ""));
    assert_eq!(find_key(&model_spec(), &spec(&|out| out.text(4, "stable"))), key(None, "stable"));
    let both = spec(&|out| {
        out.bytes(2, b"");
        out.text(4, "stable");
    });
    assert_eq!(find_key(&model_spec(), &both), None);
    assert_eq!(find_key(&model_spec(), &[numbered.clone(), numbered].concat()), None);
}

#[test]
fn answers_are_read_back() {
    let bytes: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|number| number.to_le_bytes()).collect();
    let output = Output { name: "y", dtype: Dtype::F32, shape: &[1, 2], bytes: &bytes };
    let answer = openinference::Response { model: "m", version: "1", id: "i", raw: true, outputs: &[output] };
    assert_eq!(answer.check(), Ok(()));
    let body = message(|out| answer.write(out));
    assert!(well_formed(&body));
    assert!(body.ends_with(&bytes));

    let answer = tfserving::Response { model: "m", version: Some(0), signature: "s", outputs: &[output] };
    assert_eq!(answer.check(), Ok(()));
    let body = message(|out| answer.write(out));
    assert_eq!(
        body,
        [
            b"\x0a\x1b\x0a\x01y\x12\x16\x08\x01\x12\x08\x12\x02\x08\x01\x12\x02\x08\x02\x2a\x08",
            &bytes[..],
            b"\x12\x08\x0a\x01m\x12\x00\x1a\x01s"
        ]
        .concat()
    );

    let tags = [("taskId", Tag::Number(69.0)), ("none", Tag::Null)];
    let answer = seldon::Response { tags: &tags, puid: "p", names: &["a"], tensor: output };
    let body = message(|out| answer.write(out));
    let request = seldon::decode(&body).unwrap();
    assert_eq!((request.model, request.puid, request.names.as_slice()), (Some(Model::TaskId(69)), "p", &["a"][..]));
    assert_eq!(request.tags, tags);
    let doubles: Vec<u8> = [1.5f64, -2.0].iter().flat_map(|number| number.to_le_bytes()).collect();
    assert_eq!(request.tensor.in_place(), Some(&doubles[..]));
    assert_eq!(find_key(&task_id(), &body).unwrap().model, Model::TaskId(69));
}

#[test]
fn integers_come_back_from_varints() {
    let numbers = [i64::MIN, -1, 0, 1, i64::MAX];
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    let output = Output { name: "y", dtype: Dtype::I64, shape: &[5], bytes: &bytes };
    let body = message(|out| {
        tfserving::Response { model: "m", version: None, signature: "", outputs: &[output] }.write(out);
    });
    let mut fields = Fields::new(&body); // of the answer; the entry of its map is that of a request's
    let Ok(Some(Field { value: Value::Delimited(entry), .. })) = fields.next() else { panic!("{body:?}") };
    let request = message(|out| out.bytes(2, entry));
    let decoded = tfserving::decode(&request).unwrap();
    let mut out = vec![0; bytes.len()];
    assert_eq!(decoded.inputs[0].copy_to(&mut out), Ok(()));
    assert_eq!(out, bytes);
}

#[test]
fn integers_that_no_double_holds_are_left_to_the_reference() {
    for (number, expected) in [(1i64 << 53, Ok(())), (-(1 << 53), Ok(())), ((1 << 53) + 1, Err(NotPlain))] {
        let tensor = Output { name: "", dtype: Dtype::I64, shape: &[1], bytes: &number.to_le_bytes() };
        assert_eq!(seldon::Response { tags: &[], puid: "", names: &[], tensor }.check(), expected);
    }
}

#[test]
fn whatever_happens_to_a_message_nothing_panics() {
    let bytes = [1.5f32, -2.0].map(f32::to_le_bytes).concat();
    let tensor = Output { name: "x", dtype: Dtype::F32, shape: &[1, 2], bytes: &bytes };
    let predict = message(|out| {
        out.message(1, |out| out.text(1, "m"));
        out.message(2, |out| {
            out.text(1, "x");
            out.message(2, |out| {
                out.number(1, 3);
                out.message(2, |out| out.message(2, |out| out.number(1, 3)));
                out.message(7, |out| [1, 2, 300].into_iter().for_each(|number| out.varint(number)));
            });
        });
    });
    let tags = [("taskId", Tag::Text("m"))];
    let seldon = message(|out| seldon::Response { tags: &tags, puid: "p", names: &["a"], tensor }.write(out));
    let seeds = [infer("some id", &bytes), predict, seldon];
    let (mut random, mut plain) = (Random(7), 0);
    for _ in 0..200_000 {
        plain += invariants::check(&random.damaged(&seeds));
    }
    assert!(plain > 50_000, "{plain} of the messages were plain");
}
