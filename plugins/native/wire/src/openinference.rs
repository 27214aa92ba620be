//! The Open Inference Protocol's ModelInferRequest and ModelInferResponse.

use crate::tensor::{Cost, Dtype, List, Output, Shape, Tensor, Values, packed};
use crate::walk::{Fields, NotPlain, Plain, Value, once, push, text};
use crate::write::{Writer, check_bools};

#[derive(Debug, Default, PartialEq)]
pub struct Request<'a> {
    pub model: &'a str,
    pub version: Option<i64>,
    pub id: &'a str,
    pub raw: bool,
    pub inputs: Vec<Tensor<'a>>,
    pub outputs: Vec<&'a str>,
}

/// An input whose values may stand elsewhere in the message.
struct Input<'a> {
    name: &'a str,
    dtype: Dtype,
    shape: Shape,
    contents: Option<Values<'a>>,
}

/// Reads a request that has inputs and no parameters, and of them no strings.
pub fn decode(body: &[u8]) -> Plain<Request<'_>> {
    let (mut model, mut version, mut id) = (None, None, None);
    let (mut inputs, mut raws, mut outputs) = (Vec::new(), Vec::new(), Vec::new());
    let (mut fields, mut cost) = (Fields::new(body), Cost::default());
    while let Some(field) = fields.next()? {
        match (field.number, field.value) {
            (1, Value::Delimited(bytes)) => once(&mut model, text(bytes)?)?,
            (2, Value::Delimited(bytes)) => once(&mut version, bytes)?,
            (3, Value::Delimited(bytes)) => once(&mut id, text(bytes)?)?,
            (5, Value::Delimited(bytes)) => push(&mut inputs, input(bytes, &mut cost)?)?,
            (6, Value::Delimited(bytes)) => push(&mut outputs, output(bytes, &mut cost)?)?,
            (7, Value::Delimited(bytes)) => push(&mut raws, bytes)?,
            (1..=7, _) => return Err(NotPlain),
            _ => {}
        }
    }
    cost.add(&fields);
    let raw = !raws.is_empty();
    if inputs.is_empty() || (raw && raws.len() != inputs.len()) {
        return Err(NotPlain);
    }
    let mut tensors: Vec<Tensor<'_>> = Vec::with_capacity(inputs.len());
    let mut raws = raws.into_iter();
    for input in inputs {
        let values = match (raws.next(), input.contents) {
            (Some(bytes), None) => Values::Raw(bytes),
            (None, Some(values)) => values,
            (None, None) if list_of(input.dtype).is_some() => Values::Raw(&[]),
            _ => return Err(NotPlain),
        };
        cost.add_values(values);
        tensors.push(Tensor::checked(input.name, input.dtype, input.shape, values)?);
    }
    cost.check(body.len())?;
    let version = version.map_or(Ok(None), number)?;
    let (model, id) = (model.unwrap_or_default(), id.unwrap_or_default());
    Ok(Request { model, version, id, raw, inputs: tensors, outputs })
}

/// The number of a version, from its text; longer numbers and signs are not plain.
fn number(version: &[u8]) -> Plain<Option<i64>> {
    match version.len() {
        0 => Ok(None),
        1..=18 if version.iter().all(u8::is_ascii_digit) => {
            Ok(Some(version.iter().fold(0, |number, digit| number * 10 + i64::from(digit - b'0'))))
        }
        _ => Err(NotPlain),
    }
}

fn input<'a>(message: &'a [u8], cost: &mut Cost) -> Plain<Input<'a>> {
    let (mut name, mut datatype, mut contents) = (None, None, None);
    let (mut fields, mut shape) = (Fields::new(message), Shape::default());
    while let Some(field) = fields.next()? {
        match (field.number, field.value) {
            (1, Value::Delimited(bytes)) => once(&mut name, text(bytes)?)?,
            (2, Value::Delimited(bytes)) => once(&mut datatype, bytes)?,
            (3, value) => shape.extend(value)?,
            (5, Value::Delimited(bytes)) => once(&mut contents, bytes)?,
            (1..=5, _) => return Err(NotPlain),
            _ => {}
        }
    }
    cost.add(&fields);
    let dtype = dtype_of(datatype.ok_or(NotPlain)?)?;
    let contents = contents.map_or(Ok(None), |bytes| values(bytes, dtype, cost))?;
    Ok(Input { name: name.unwrap_or_default(), dtype, shape, contents })
}

/// The values of typed contents; `None` of empty ones, which MLServer sends beside raw contents.
fn values<'a>(message: &'a [u8], dtype: Dtype, cost: &mut Cost) -> Plain<Option<Values<'a>>> {
    let (mut fields, mut found) = (Fields::new(message), None);
    while let Some(field) = fields.next()? {
        let (number, list) = list_of(dtype).ok_or(NotPlain)?;
        if field.number != number {
            return Err(NotPlain);
        }
        packed(field.value, list, &mut found)?;
    }
    cost.add(&fields);
    Ok(found)
}

fn output<'a>(message: &'a [u8], cost: &mut Cost) -> Plain<&'a str> {
    let (mut fields, mut name) = (Fields::new(message), None);
    while let Some(field) = fields.next()? {
        match (field.number, field.value) {
            (1, Value::Delimited(bytes)) => once(&mut name, text(bytes)?)?,
            _ => return Err(NotPlain),
        }
    }
    cost.add(&fields);
    Ok(name.unwrap_or_default())
}

const NAMES: [(&str, Dtype); 13] = {
    use Dtype::*;
    [
        ("BOOL", Bool),
        ("UINT8", U8),
        ("UINT16", U16),
        ("UINT32", U32),
        ("UINT64", U64),
        ("INT8", I8),
        ("INT16", I16),
        ("INT32", I32),
        ("INT64", I64),
        ("FP16", F16),
        ("BF16", Bf16),
        ("FP32", F32),
        ("FP64", F64),
    ]
};

fn dtype_of(name: &[u8]) -> Plain<Dtype> {
    NAMES.iter().find(|(known, _)| known.as_bytes() == name).map(|(_, dtype)| *dtype).ok_or(NotPlain)
}

fn name_of(dtype: Dtype) -> Plain<&'static str> {
    NAMES.iter().find(|(_, known)| *known == dtype).map(|(name, _)| *name).ok_or(NotPlain)
}

/// The field of typed contents for a dtype, with the type of its varints; `None` if there is no such field.
fn list_of(dtype: Dtype) -> Option<(u32, Option<List>)> {
    use Dtype::*;
    match dtype {
        Bool => Some((1, Some(List::Bool))),
        I8 | I16 | I32 => Some((2, Some(List::Int32))),
        I64 => Some((3, Some(List::Bits64))),
        U8 | U16 | U32 => Some((4, Some(List::Uint32))),
        U64 => Some((5, Some(List::Bits64))),
        F32 => Some((6, None)),
        F64 => Some((7, None)),
        F16 | Bf16 | C64 | C128 => None,
    }
}

/// An answer.
pub struct Response<'a> {
    pub model: &'a str,
    pub version: &'a str,
    pub id: &'a str,
    pub raw: bool,
    pub outputs: &'a [Output<'a>],
}

impl Response<'_> {
    /// Refuses what `write` cannot write as the reference does: dtypes that the protocol lacks, and typed tensors
    /// without values.
    pub fn check(&self) -> Plain<()> {
        let raw = self.is_raw();
        for output in self.outputs {
            name_of(output.dtype)?;
            if !raw {
                check_bools(output.dtype, output.bytes)?;
                if output.bytes.is_empty() {
                    return Err(NotPlain);
                }
            }
        }
        Ok(())
    }

    /// Whether the tensors are raw: if one exists only so, all are.
    fn is_raw(&self) -> bool {
        self.raw || self.outputs.iter().any(|output| list_of(output.dtype).is_none())
    }

    /// Writes the message, which `check` has not refused.
    pub fn write(&self, out: &mut Writer<'_>) {
        out.text(1, self.model);
        out.text(2, self.version);
        out.text(3, self.id);
        let raw = self.is_raw();
        for output in self.outputs {
            out.message(5, |out| {
                out.text(1, output.name);
                out.text(2, name_of(output.dtype).unwrap_or_default());
                if !output.shape.is_empty() {
                    out.message(3, |out| output.shape.iter().for_each(|&size| out.varint(size as u64)));
                }
                if let (false, Some((number, list))) = (raw, list_of(output.dtype)) {
                    out.message(5, |out| out.list(number, list, output.dtype, output.bytes));
                }
            });
        }
        if raw {
            self.outputs.iter().for_each(|output| out.bytes(6, output.bytes));
        }
    }
}
