//! TensorFlow Serving's PredictRequest and PredictResponse.

use crate::key::int64;
use crate::tensor::{Cost, Dtype, List, Output, Shape, Tensor, Values, packed};
use crate::walk::{Fields, NotPlain, Plain, Value, once, push, text};
use crate::write::{Writer, check_bools};

#[derive(Debug, Default, PartialEq)]
pub struct Request<'a> {
    pub model: &'a str,
    pub version: Option<i64>,
    pub label: &'a str,
    pub signature: &'a str,
    pub inputs: Vec<Tensor<'a>>,
    pub outputs: Vec<&'a str>,
}

/// Reads a request whose tensors have all their values, and none of which has strings.
pub fn decode(body: &[u8]) -> Plain<Request<'_>> {
    let (mut fields, mut spec, mut cost) = (Fields::new(body), None, Cost::default());
    let mut request = Request::default();
    while let Some(field) = fields.next()? {
        match (field.number, field.value) {
            (1, Value::Delimited(bytes)) => once(&mut spec, bytes)?,
            (2, Value::Delimited(bytes)) => push(&mut request.inputs, entry(bytes, &mut cost)?)?,
            (3, Value::Delimited(bytes)) => push(&mut request.outputs, text(bytes)?)?,
            (1..=3, _) => return Err(NotPlain),
            _ => {}
        }
    }
    cost.add(&fields);
    if let Some(spec) = spec {
        read_spec(spec, &mut request, &mut cost)?;
    }
    cost.check(body.len())?;
    Ok(request)
}

fn read_spec<'a>(message: &'a [u8], request: &mut Request<'a>, cost: &mut Cost) -> Plain<()> {
    let (mut name, mut version, mut signature, mut label) = (None, None, None, None);
    let mut fields = Fields::new(message);
    while let Some(field) = fields.next()? {
        match (field.number, field.value) {
            (1, Value::Delimited(bytes)) => once(&mut name, text(bytes)?)?,
            (2, Value::Delimited(bytes)) => once(&mut version, int64(bytes, 1)?)?,
            (3, Value::Delimited(bytes)) => once(&mut signature, text(bytes)?)?,
            (4, Value::Delimited(bytes)) => once(&mut label, text(bytes)?)?,
            (1..=4, _) => return Err(NotPlain),
            _ => {}
        }
    }
    cost.add(&fields);
    if version.is_some() && label.is_some() {
        return Err(NotPlain); // the last one counts
    }
    request.model = name.unwrap_or_default();
    request.version = version;
    request.signature = signature.unwrap_or_default();
    request.label = label.unwrap_or_default();
    Ok(())
}

fn entry<'a>(message: &'a [u8], cost: &mut Cost) -> Plain<Tensor<'a>> {
    let (mut fields, mut key, mut value) = (Fields::new(message), None, None);
    while let Some(field) = fields.next()? {
        match (field.number, field.value) {
            (1, Value::Delimited(bytes)) => once(&mut key, text(bytes)?)?,
            (2, Value::Delimited(bytes)) => once(&mut value, bytes)?,
            _ => return Err(NotPlain),
        }
    }
    cost.add(&fields);
    tensor(key.ok_or(NotPlain)?, value.ok_or(NotPlain)?, cost)
}

fn tensor<'a>(name: &'a str, message: &'a [u8], cost: &mut Cost) -> Plain<Tensor<'a>> {
    let (mut dtype, mut shape, mut content, mut list) = (None, None, None, None);
    let mut fields = Fields::new(message);
    while let Some(field) = fields.next()? {
        match (field.number, field.value) {
            (1, Value::Varint(number)) => once(&mut dtype, number)?,
            (2, Value::Delimited(bytes)) => once(&mut shape, read_shape(bytes, cost)?)?,
            (3, Value::Varint(_)) => {} // the version of the format: the reference does not read it
            (4, Value::Delimited(bytes)) => once(&mut content, bytes)?,
            (5..=17, value) => once(&mut list, (field.number, value))?,
            (1..=4, _) => return Err(NotPlain),
            _ => {}
        }
    }
    cost.add(&fields);
    let dtype = dtype_of(dtype.ok_or(NotPlain)?)?;
    let values = match (content.filter(|bytes| !bytes.is_empty()), list) {
        (Some(bytes), None) => Values::Raw(bytes),
        (None, Some((number, value))) if number == list_of(dtype).0 => {
            let mut values = None;
            packed(value, list_of(dtype).1, &mut values)?;
            values.ok_or(NotPlain)?
        }
        (None, None) => Values::Raw(&[]),
        _ => return Err(NotPlain),
    };
    cost.add_values(values);
    Tensor::checked(name, dtype, shape.unwrap_or_default(), values)
}

fn read_shape(message: &[u8], cost: &mut Cost) -> Plain<Shape> {
    let (mut fields, mut shape) = (Fields::new(message), Shape::default());
    while let Some(field) = fields.next()? {
        match (field.number, field.value) {
            (2, Value::Delimited(bytes)) => {
                let (mut dim, mut size) = (Fields::new(bytes), None);
                while let Some(field) = dim.next()? {
                    match (field.number, field.value) {
                        (1, Value::Varint(value)) => once(&mut size, value)?,
                        _ => return Err(NotPlain),
                    }
                }
                cost.add(&dim);
                shape.push(size.unwrap_or_default())?;
            }
            _ => return Err(NotPlain),
        }
    }
    cost.add(&fields);
    Ok(shape)
}

/// By numbers of tensorflow.DataType.
const NUMBERS: [(u64, Dtype); 15] = {
    use Dtype::*;
    [
        (1, F32),
        (2, F64),
        (3, I32),
        (4, U8),
        (5, I16),
        (6, I8),
        (8, C64),
        (9, I64),
        (10, Bool),
        (14, Bf16),
        (17, U16),
        (18, C128),
        (19, F16),
        (22, U32),
        (23, U64),
    ]
};

fn dtype_of(number: u64) -> Plain<Dtype> {
    NUMBERS.iter().find(|(known, _)| *known == number).map(|(_, dtype)| *dtype).ok_or(NotPlain)
}

fn number_of(dtype: Dtype) -> u64 {
    NUMBERS.iter().find(|(_, known)| *known == dtype).map_or(0, |(number, _)| *number)
}

/// The field of a TensorProto for a dtype, with the type of its varints.
fn list_of(dtype: Dtype) -> (u32, Option<List>) {
    use Dtype::*;
    match dtype {
        F32 => (5, None),
        F64 => (6, None),
        I32 | U8 | I16 | I8 | U16 => (7, Some(List::Int32)),
        C64 => (9, None),
        I64 => (10, Some(List::Bits64)),
        Bool => (11, Some(List::Bool)),
        C128 => (12, None),
        F16 | Bf16 => (13, Some(List::Int32)),
        U32 => (16, Some(List::Uint32)),
        U64 => (17, Some(List::Bits64)),
    }
}

/// An answer, whose tensors are typed lists.
pub struct Response<'a> {
    pub model: &'a str,
    pub version: Option<i64>,
    pub signature: &'a str,
    pub outputs: &'a [Output<'a>],
}

impl Response<'_> {
    /// Refuses what `write` cannot write as the reference does.
    pub fn check(&self) -> Plain<()> {
        self.outputs.iter().try_for_each(|output| check_bools(output.dtype, output.bytes))
    }

    /// Writes the message, which `check` has not refused.
    pub fn write(&self, out: &mut Writer<'_>) {
        for output in self.outputs {
            out.message(1, |out| {
                out.bytes(1, output.name.as_bytes());
                out.message(2, |out| {
                    out.number(1, number_of(output.dtype));
                    out.message(2, |out| {
                        for &size in output.shape {
                            out.message(2, |out| {
                                if size != 0 {
                                    out.number(1, size as u64);
                                }
                            });
                        }
                    });
                    let (number, list) = list_of(output.dtype);
                    out.list(number, list, output.dtype, output.bytes);
                });
            });
        }
        out.message(2, |out| {
            out.text(1, self.model);
            if let Some(version) = self.version {
                out.message(2, |out| {
                    if version != 0 {
                        out.number(1, version as u64);
                    }
                });
            }
            out.text(3, self.signature);
        });
    }
}
