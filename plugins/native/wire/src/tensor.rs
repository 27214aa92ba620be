//! Tensors as they stand in messages.

use crate::walk::{FACTOR, FREE, Fields, MOST, NotPlain, PACKED_VARINT, Plain, SMALL, Value, once, varint};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Dtype {
    Bool,
    U8,
    U16,
    U32,
    U64,
    I8,
    I16,
    I32,
    I64,
    F16,
    Bf16,
    F32,
    F64,
    C64,
    C128,
}

impl Dtype {
    pub const ALL: [Dtype; 15] = {
        use Dtype::*;
        [Bool, U8, U16, U32, U64, I8, I16, I32, I64, F16, Bf16, F32, F64, C64, C128]
    };

    pub fn size(self) -> usize {
        use Dtype::*;
        match self {
            Bool | U8 | I8 => 1,
            U16 | I16 | F16 | Bf16 => 2,
            U32 | I32 | F32 => 4,
            U64 | I64 | F64 | C64 => 8,
            C128 => 16,
        }
    }

    /// What numpy calls it.
    pub fn name(self) -> &'static str {
        use Dtype::*;
        match self {
            Bool => "bool",
            U8 => "uint8",
            U16 => "uint16",
            U32 => "uint32",
            U64 => "uint64",
            I8 => "int8",
            I16 => "int16",
            I32 => "int32",
            I64 => "int64",
            F16 => "float16",
            Bf16 => "bfloat16",
            F32 => "float32",
            F64 => "float64",
            C64 => "complex64",
            C128 => "complex128",
        }
    }
}

/// Dimensions of a plain tensor, at most.
const DIMENSIONS: usize = 8;
/// Rows, and other sizes, of a plain tensor without values, at most: the reference refuses more than 1,024 rows.
const EMPTY: i64 = 1024;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shape {
    sizes: [isize; DIMENSIONS],
    dimensions: usize,
}

impl Shape {
    pub fn sizes(&self) -> &[isize] {
        self.sizes.get(..self.dimensions).unwrap_or_default()
    }

    pub fn push(&mut self, size: u64) -> Plain<()> {
        let place = self.sizes.get_mut(self.dimensions).ok_or(NotPlain)?;
        *place = isize::try_from(size).map_err(|_| NotPlain)?;
        self.dimensions += 1;
        Ok(())
    }

    /// Adds the sizes of one occurrence of a repeated int64.
    pub fn extend(&mut self, value: Value<'_>) -> Plain<()> {
        match value {
            Value::Varint(size) => self.push(size),
            Value::Delimited(packed) => {
                let mut at = 0;
                while at < packed.len() {
                    let (size, end) = varint(packed, at)?;
                    self.push(size)?;
                    at = end;
                }
                Ok(())
            }
            _ => Err(NotPlain),
        }
    }

    /// How many values a tensor of this shape has.
    pub fn count(&self) -> Plain<usize> {
        let count = self.sizes().iter().try_fold(1usize, |count, &size| count.checked_mul(size as usize));
        if count == Some(0) && self.sizes().iter().any(|&size| size as i64 > EMPTY) {
            return Err(NotPlain);
        }
        count.ok_or(NotPlain)
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Values<'a> {
    /// The tensor's bytes, little-endian. Those of bools may have any value; one that is not 0 is true.
    Raw(&'a [u8]),
    /// A packed varint for each value, in a list of this kind.
    Varints(&'a [u8], List),
}

/// The type of a list's varints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum List {
    Bool,
    Int32,
    Uint32,
    Bits64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tensor<'a> {
    pub name: &'a str,
    pub dtype: Dtype,
    pub shape: Shape,
    pub values: Values<'a>,
}

impl<'a> Tensor<'a> {
    /// A tensor whose values and shape fit each other.
    pub fn checked(name: &'a str, dtype: Dtype, shape: Shape, values: Values<'a>) -> Plain<Self> {
        let count = shape.count()?;
        let fits = match values {
            Values::Raw(bytes) => Some(bytes.len()) == count.checked_mul(dtype.size()),
            Values::Varints(bytes, _) => bytes.len() >= count && count_varints(bytes) == count,
        };
        if fits { Ok(Tensor { name, dtype, shape, values }) } else { Err(NotPlain) }
    }

    /// The tensor's bytes where they stand in the message; `None` if they are written in another way there.
    pub fn in_place(&self) -> Option<&'a [u8]> {
        match self.values {
            Values::Raw(bytes) if self.dtype != Dtype::Bool => Some(bytes),
            _ => None,
        }
    }

    /// How many bytes the tensor has.
    pub fn size(&self) -> usize {
        match self.values {
            Values::Raw(bytes) => bytes.len(),
            Values::Varints(bytes, _) => count_varints(bytes) * self.dtype.size(),
        }
    }

    /// Writes the tensor's bytes, little-endian, into `out`, which has their size.
    pub fn copy_to(&self, out: &mut [u8]) -> Plain<()> {
        match (self.values, self.dtype) {
            (Values::Raw(bytes), Dtype::Bool) => {
                out.iter_mut().zip(bytes).for_each(|(to, from)| *to = u8::from(*from != 0));
                Ok(())
            }
            (Values::Raw(bytes), _) => {
                out.copy_from_slice(bytes);
                Ok(())
            }
            (Values::Varints(bytes, list), dtype) => unpack(bytes, list, dtype, out),
        }
    }
}

fn count_varints(bytes: &[u8]) -> usize {
    bytes.iter().filter(|&&byte| byte < 0x80).count()
}

fn unpack(bytes: &[u8], list: List, dtype: Dtype, out: &mut [u8]) -> Plain<()> {
    use Dtype::*;
    match (list, dtype) {
        (List::Bool, Bool) => each(bytes, out, |value| Ok([u8::from(value != 0)])),
        (List::Bits64, I64 | U64) => each(bytes, out, |value| Ok(value.to_le_bytes())),
        (List::Int32, I32) | (List::Uint32, U32) => each(bytes, out, |value| Ok((value as u32).to_le_bytes())),
        (List::Int32, I8) => each(bytes, out, |value| Ok(narrow::<i8, _>(value as i32)?.to_le_bytes())),
        (List::Int32, I16) => each(bytes, out, |value| Ok(narrow::<i16, _>(value as i32)?.to_le_bytes())),
        (List::Int32, U8) => each(bytes, out, |value| Ok(narrow::<u8, _>(value as i32)?.to_le_bytes())),
        (List::Int32, U16 | F16 | Bf16) => each(bytes, out, |value| Ok(narrow::<u16, _>(value as i32)?.to_le_bytes())),
        (List::Uint32, U8) => each(bytes, out, |value| Ok(narrow::<u8, _>(value as u32)?.to_le_bytes())),
        (List::Uint32, U16) => each(bytes, out, |value| Ok(narrow::<u16, _>(value as u32)?.to_le_bytes())),
        _ => Err(NotPlain),
    }
}

fn narrow<To: TryFrom<From>, From>(value: From) -> Plain<To> {
    To::try_from(value).map_err(|_| NotPlain)
}

#[inline]
fn each<const N: usize>(bytes: &[u8], out: &mut [u8], write: impl Fn(u64) -> Plain<[u8; N]>) -> Plain<()> {
    let mut at = 0;
    for place in out.chunks_exact_mut(N) {
        let (value, end) = varint(bytes, at)?;
        place.copy_from_slice(&write(value)?);
        at = end;
    }
    if at == bytes.len() { Ok(()) } else { Err(NotPlain) }
}

/// The one packed occurrence of a list of `width` bytes each, or of varints, in which a tensor's values stand.
pub fn packed<'a>(value: Value<'a>, list: Option<List>, place: &mut Option<Values<'a>>) -> Plain<()> {
    let Value::Delimited(bytes) = value else { return Err(NotPlain) };
    once(place, list.map_or(Values::Raw(bytes), |list| Values::Varints(bytes, list)))
}

/// What a message costs to decode at most, as far as it is known.
#[derive(Debug, Default)]
pub struct Cost {
    fields: usize,
    varints: usize,
    content: usize,
}

/// Bytes that a field costs by `dl_inference_core.wire.limits`, at most: an entry of a map with a tensor in it, the
/// first of its map, costs the most of the fields that are read here.
pub const MOST_PER_FIELD: usize = 416;

impl Cost {
    /// Counts the fields that `fields` has returned.
    pub fn add(&mut self, fields: &Fields<'_>) {
        self.add_fields(fields.count());
    }

    pub fn add_fields(&mut self, count: usize) {
        self.fields += count;
    }

    pub fn add_values(&mut self, values: Values<'_>) {
        match values {
            Values::Raw(bytes) => self.content += bytes.len(),
            Values::Varints(bytes, _) => self.varints += bytes.len(),
        }
    }

    /// Whether the reference decodes a message of `size` bytes that costs this much.
    pub fn check(&self, size: usize) -> Plain<()> {
        if size <= SMALL {
            return Ok(());
        }
        // The reference takes large contents out of a message before it counts the rest.
        let most = (FACTOR * (size - self.content) + FREE).min(MOST);
        let cost = self.fields * MOST_PER_FIELD + self.varints * PACKED_VARINT;
        if cost > most { Err(NotPlain) } else { Ok(()) }
    }
}

/// A tensor of an answer.
#[derive(Debug, Clone, Copy)]
pub struct Output<'a> {
    pub name: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    /// Little-endian, row-major.
    pub bytes: &'a [u8],
}
