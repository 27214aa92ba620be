//! Seldon's SeldonMessage with a `data.tensor`.

use crate::key::{Model, Tag, entry};
use crate::tensor::{Cost, Dtype, Output, Shape, Tensor, Values, packed};
use crate::walk::{Fields, NotPlain, Plain, Value, once, push, text};
use crate::write::Writer;

#[derive(Debug, PartialEq)]
pub struct Request<'a> {
    /// What the tag `taskId` names.
    pub model: Option<Model<'a>>,
    pub tags: Vec<(&'a str, Tag<'a>)>,
    pub puid: &'a str,
    pub names: Vec<&'a str>,
    pub tensor: Tensor<'a>,
}

/// Reads a message that has a `data.tensor`, and of whose tags none is an object or a list.
pub fn decode(body: &[u8]) -> Plain<Request<'_>> {
    let (mut meta, mut data, mut cost) = (None, None, Cost::default());
    let mut fields = Fields::new(body);
    while let Some(field) = fields.next()? {
        match (field.number, field.value) {
            (2, Value::Delimited(bytes)) => once(&mut meta, bytes)?,
            (3, Value::Delimited(bytes)) => once(&mut data, bytes)?,
            (1..=7, _) => return Err(NotPlain),
            _ => {}
        }
    }
    cost.add(&fields);
    let (puid, tags) = read_meta(meta.unwrap_or_default(), &mut cost)?;
    let (names, tensor) = read_data(data.ok_or(NotPlain)?, &mut cost)?;
    cost.check(body.len())?;
    let model = tags.iter().find(|(name, _)| *name == "taskId").map(|(_, tag)| tag.task()).transpose()?;
    Ok(Request { model, tags, puid, names, tensor })
}

/// Fields of an entry with a Value in it.
const FIELDS_OF_TAG: usize = 3;

type Meta<'a> = (&'a str, Vec<(&'a str, Tag<'a>)>);

fn read_meta<'a>(message: &'a [u8], cost: &mut Cost) -> Plain<Meta<'a>> {
    let (mut fields, mut puid, mut tags) = (Fields::new(message), None, Vec::new());
    while let Some(field) = fields.next()? {
        match (field.number, field.value) {
            (1, Value::Delimited(bytes)) => once(&mut puid, text(bytes)?)?,
            (2, Value::Delimited(bytes)) => {
                let (name, tag) = entry(bytes)?;
                if tags.len() == MOST_TAGS || tags.iter().any(|(known, _)| *known == name) {
                    return Err(NotPlain);
                }
                tags.push((name, tag));
                cost.add_fields(FIELDS_OF_TAG);
            }
            (1..=5, _) => return Err(NotPlain),
            _ => {}
        }
    }
    cost.add(&fields);
    Ok((puid.unwrap_or_default(), tags))
}

/// Tags that are compared to each other, one by one.
const MOST_TAGS: usize = 32;

fn read_data<'a>(message: &'a [u8], cost: &mut Cost) -> Plain<(Vec<&'a str>, Tensor<'a>)> {
    let (mut fields, mut names, mut tensor) = (Fields::new(message), Vec::new(), None);
    while let Some(field) = fields.next()? {
        match (field.number, field.value) {
            (1, Value::Delimited(bytes)) => push(&mut names, text(bytes)?)?,
            (2, Value::Delimited(bytes)) => once(&mut tensor, read_tensor(bytes, cost)?)?,
            (1..=4, _) => return Err(NotPlain),
            _ => {}
        }
    }
    cost.add(&fields);
    Ok((names, tensor.ok_or(NotPlain)?))
}

fn read_tensor<'a>(message: &'a [u8], cost: &mut Cost) -> Plain<Tensor<'a>> {
    let (mut fields, mut shape, mut values) = (Fields::new(message), Shape::default(), None);
    while let Some(field) = fields.next()? {
        match field.number {
            1 => shape.extend(field.value)?,
            2 => packed(field.value, None, &mut values)?,
            _ => {}
        }
    }
    if shape.sizes().iter().any(|&size| size > i32::MAX as isize) {
        return Err(NotPlain); // protobuf would cut it
    }
    cost.add(&fields);
    let values = values.unwrap_or(Values::Raw(&[]));
    cost.add_values(values);
    Tensor::checked("", Dtype::F64, shape, values)
}

/// An answer whose payload is a tensor.
pub struct Response<'a> {
    pub tags: &'a [(&'a str, Tag<'a>)],
    pub puid: &'a str,
    pub names: &'a [&'a str],
    /// Its name is not sent.
    pub tensor: Output<'a>,
}

/// A double holds every integer up to this magnitude.
const EXACT: u64 = 1 << 53;

impl Response<'_> {
    /// Refuses what `write` cannot write as the reference does: dtypes that are not real numbers, and integers that no
    /// double holds.
    pub fn check(&self) -> Plain<()> {
        let bytes = self.tensor.bytes;
        let exact = match self.tensor.dtype {
            Dtype::I64 => numbers(bytes).all(|number| i64::from_le_bytes(number).unsigned_abs() <= EXACT),
            Dtype::U64 => numbers(bytes).all(|number| u64::from_le_bytes(number) <= EXACT),
            Dtype::Bool | Dtype::F16 | Dtype::Bf16 | Dtype::C64 | Dtype::C128 => false,
            _ => true,
        };
        if exact { Ok(()) } else { Err(NotPlain) }
    }

    /// Writes the message, which `check` has not refused.
    pub fn write(&self, out: &mut Writer<'_>) {
        out.message(2, |out| {
            out.text(1, self.puid);
            for (name, tag) in self.tags {
                out.message(2, |out| {
                    out.bytes(1, name.as_bytes());
                    out.message(2, |out| match tag {
                        Tag::Null => out.number(1, 0),
                        Tag::Number(number) => out.double(2, *number),
                        Tag::Text(text) => out.bytes(3, text.as_bytes()),
                        Tag::Bool(value) => out.number(4, u64::from(*value)),
                    });
                });
            }
        });
        out.message(3, |out| {
            self.names.iter().for_each(|name| out.bytes(1, name.as_bytes()));
            out.message(2, |out| {
                out.message(1, |out| self.tensor.shape.iter().for_each(|&size| out.varint(size as u64)));
                self.write_values(out);
            });
        });
    }

    fn write_values(&self, out: &mut Writer<'_>) {
        let bytes = self.tensor.bytes;
        match self.tensor.dtype {
            Dtype::U8 => out.doubles(2, bytes, |[byte]: [u8; 1]| f64::from(byte)),
            Dtype::I8 => out.doubles(2, bytes, |[byte]: [u8; 1]| f64::from(byte as i8)),
            Dtype::U16 => out.doubles(2, bytes, |number| f64::from(u16::from_le_bytes(number))),
            Dtype::I16 => out.doubles(2, bytes, |number| f64::from(i16::from_le_bytes(number))),
            Dtype::U32 => out.doubles(2, bytes, |number| f64::from(u32::from_le_bytes(number))),
            Dtype::I32 => out.doubles(2, bytes, |number| f64::from(i32::from_le_bytes(number))),
            Dtype::U64 => out.doubles(2, bytes, |number| u64::from_le_bytes(number) as f64),
            Dtype::I64 => out.doubles(2, bytes, |number| i64::from_le_bytes(number) as f64),
            Dtype::F32 => out.doubles(2, bytes, |number| f64::from(f32::from_le_bytes(number))),
            _ => out.bytes(2, bytes),
        }
    }
}

fn numbers(bytes: &[u8]) -> impl Iterator<Item = [u8; 8]> {
    bytes.as_chunks().0.iter().copied()
}
