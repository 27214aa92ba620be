//! Routing keys, whose places in a request are data.

use crate::walk::{Fields, NotPlain, Plain, SMALL, Value, once, text};

/// `dl_inference_core.wire.routing_keys.KeyFields`: where a routing key stands in a request, as paths of field numbers
/// from the outermost message inwards. They name every field on the way that the reference's reader declares, so that
/// both judge the same fields. An empty path is of a field that the requests do not have.
#[derive(Debug, Clone, Default)]
pub struct KeyFields {
    /// Of a string.
    pub model: Vec<u32>,
    /// As deep as `model`, of a string; deeper, of the number in a google.protobuf.Int64Value.
    pub version: Vec<u32>,
    /// Of a string, in a oneof with the version.
    pub label: Vec<u32>,
    /// Of a `map<string, google.protobuf.Value>`, where `model` is empty.
    pub tags: Vec<u32>,
    /// The key under which that map names the model by a string or a whole number.
    pub task: String,
    /// The number of a field of submessages that say what place in a queue a request asks for; 0 where the protocol has
    /// none.
    pub queueing: u32,
}

/// Which model a request is for, as the request says it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Key<'a> {
    pub model: Model<'a>,
    pub version: Option<Version<'a>>,
    pub label: &'a str,
    /// Whether the request has the field `KeyFields::queueing`.
    pub queueing: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Model<'a> {
    Name(&'a str),
    TaskId(i64),
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Version<'a> {
    Number(i64),
    /// As it stands in the request; may be empty.
    Text(&'a str),
}

/// Fields of a large message that the reference's reader steps over by itself.
const MOST_FIELDS: usize = 32;
/// Bytes of a field of a key in a large message: those of its two fields together are not counted by the reference.
const MOST_BYTES: usize = 1024;
/// A double holds every whole number up to this magnitude.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// The routing key of a request's bytes; `None` unless it is there, and as the reference reads it.
pub fn find_key<'a>(fields: &KeyFields, body: &'a [u8]) -> Option<Key<'a>> {
    find(fields, body).ok()
}

fn find<'a>(fields: &KeyFields, body: &'a [u8]) -> Plain<Key<'a>> {
    let model = if fields.tags.is_empty() {
        Model::Name(text(at(body, &fields.model)?.ok_or(NotPlain)?)?)
    } else {
        task(body, &fields.tags, &fields.task)?
    };
    if model == Model::Name("") {
        return Err(NotPlain);
    }
    let version = match fields.version.split_last() {
        None => None,
        Some((number, outer)) if fields.version.len() > fields.model.len() => {
            at(body, outer)?.map(|message| int64(message, *number)).transpose()?.map(Version::Number)
        }
        Some(_) => Some(Version::Text(text(at(body, &fields.version)?.unwrap_or_default())?)),
    };
    let label = if fields.label.is_empty() { None } else { at(body, &fields.label)?.map(text).transpose()? };
    if label.is_some() && version.is_some() {
        return Err(NotPlain); // the last one counts
    }
    let queueing = fields.queueing != 0 && occurs(body, fields.queueing)?;
    Ok(Key { model, version, label: label.unwrap_or_default(), queueing })
}

/// Whether the message has a submessage in the field of that number.
fn occurs(body: &[u8], number: u32) -> Plain<bool> {
    let (mut fields, mut occurs) = (Fields::new(body), false);
    while let Some(field) = fields.next()? {
        occurs |= field.number == number && matches!(field.value, Value::Delimited(_));
    }
    Ok(occurs)
}

/// The length-delimited value at the end of `path`, each field of which occurs once at most.
fn at<'a>(body: &'a [u8], path: &[u32]) -> Plain<Option<&'a [u8]>> {
    let mut message = body;
    for (depth, number) in path.iter().enumerate() {
        let (mut fields, mut found) = (Fields::new(message), None);
        while let Some(field) = fields.next()? {
            match (field.number, field.value) {
                (number_, Value::Delimited(value)) if number_ == *number => once(&mut found, value)?,
                (number_, _) if number_ == *number => return Err(NotPlain),
                _ => {}
            }
        }
        message = match found {
            None => return Ok(None),
            // Elsewhere the reference counts what the key, or the whole message, costs to decode.
            Some(value)
                if depth == 0 && body.len() >= SMALL && (fields.count() > MOST_FIELDS || value.len() >= MOST_BYTES) =>
            {
                return Err(NotPlain);
            }
            Some(value) => value,
        };
    }
    Ok(Some(message))
}

/// The number in a google.protobuf.Int64Value, whose only field has this `number`.
pub fn int64(message: &[u8], number: u32) -> Plain<i64> {
    let (mut fields, mut found) = (Fields::new(message), None);
    while let Some(field) = fields.next()? {
        match (field.number, field.value) {
            (known, Value::Varint(value)) if known == number => once(&mut found, value as i64)?,
            _ => return Err(NotPlain),
        }
    }
    Ok(found.unwrap_or_default())
}

/// What the map at `path` says under `key`.
fn task<'a>(body: &'a [u8], path: &[u32], key: &str) -> Plain<Model<'a>> {
    let (map, path) = path.split_last().ok_or(NotPlain)?;
    let (mut fields, mut found) = (Fields::new(at(body, path)?.ok_or(NotPlain)?), None);
    while let Some(field) = fields.next()? {
        match (field.number, field.value) {
            (number, Value::Delimited(value)) if number == *map => {
                let (name, tag) = entry(value)?;
                if name == key {
                    once(&mut found, tag)?;
                }
            }
            (number, _) if number == *map => return Err(NotPlain),
            _ => {}
        }
    }
    found.ok_or(NotPlain)?.task()
}

/// A google.protobuf.Value that is neither an object nor a list.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Tag<'a> {
    Null,
    Number(f64),
    Text(&'a str),
    Bool(bool),
}

impl<'a> Tag<'a> {
    /// The task that a `taskId` names.
    pub fn task(self) -> Plain<Model<'a>> {
        match self {
            Tag::Text(name) if !name.is_empty() => Ok(Model::Name(name)),
            Tag::Number(number) if number.abs() <= EXACT && number.fract() == 0.0 => Ok(Model::TaskId(number as i64)),
            _ => Err(NotPlain),
        }
    }
}

/// An entry of a `map<string, google.protobuf.Value>`.
pub fn entry(message: &[u8]) -> Plain<(&str, Tag<'_>)> {
    let (mut fields, mut key, mut value) = (Fields::new(message), None, None);
    while let Some(field) = fields.next()? {
        match (field.number, field.value) {
            (1, Value::Delimited(bytes)) => once(&mut key, text(bytes)?)?,
            (2, Value::Delimited(bytes)) => once(&mut value, tag(bytes)?)?,
            _ => return Err(NotPlain),
        }
    }
    Ok((key.ok_or(NotPlain)?, value.ok_or(NotPlain)?))
}

fn tag(message: &[u8]) -> Plain<Tag<'_>> {
    let mut fields = Fields::new(message);
    let tag = match fields.next()?.map(|field| (field.number, field.value)) {
        Some((1, Value::Varint(_))) => Tag::Null,
        Some((2, Value::Fixed64(bits))) => Tag::Number(f64::from_bits(bits)),
        Some((3, Value::Delimited(bytes))) => Tag::Text(text(bytes)?),
        Some((4, Value::Varint(value))) => Tag::Bool(value != 0),
        _ => return Err(NotPlain),
    };
    if fields.next()?.is_some() { Err(NotPlain) } else { Ok(tag) }
}
