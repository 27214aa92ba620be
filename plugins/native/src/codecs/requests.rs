//! Messages as `Request` objects.

use super::Tried;
use dl_inference_wire::key::{Model, Tag};
use dl_inference_wire::{Dtype, NotPlain, Tensor, openinference, seldon, tfserving};
use numpy::npyffi::{NpyTypes, PY_ARRAY_API, PyArrayObject, get_type_object};
use numpy::{PyArrayDescr, PyArrayDescrMethods};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyInt, PyString, PyTuple, PyType};
use pyo3::{ffi, intern};

/// Bytes of a tensor from which on it is copied without the GIL: varints take 2 ms for them, or 10 ms as int8. To take
/// the GIL back can take 5 ms beside a thread that computes in Python, more than a smaller copy.
const LARGE: usize = 1 << 20;

/// Makes `Request` objects.
pub struct Requests {
    class: Py<PyType>,
    /// The fields of a `Request` that no protocol sets here, with their defaults.
    defaults: Vec<(Py<PyString>, Py<PyAny>)>,
    /// In the order of `Dtype::ALL`.
    pub dtypes: Vec<Py<PyArrayDescr>>,
    tensors: Py<PyAny>,
    raw: Py<PyAny>,
    tensor: Py<PyAny>,
}

/// The fields of a `Request` that protocols set here.
struct Facts<'a, 'py> {
    payload: Bound<'py, PyAny>,
    form: &'a Py<PyAny>,
    model: Bound<'py, PyAny>,
    version: Option<i64>,
    label: &'a str,
    signature: &'a str,
    outputs: &'a [&'a str],
    names: &'a [&'a str],
    tags: Bound<'py, PyDict>,
    id: &'a str,
}

/// Their names; and parameters, which a plain request does not have.
const SET: [&str; 11] =
    ["payload", "form", "model", "version", "label", "signature", "outputs", "names", "tags", "parameters", "id"];

impl Requests {
    pub fn new(core: &Bound<'_, PyModule>) -> PyResult<Self> {
        let py = core.py();
        let class = core.getattr("Request")?.cast_into::<PyType>()?;
        let mut defaults = vec![];
        for field in py.import("dataclasses")?.call_method1("fields", (&class,))?.try_iter()? {
            let field = field?;
            let name = field.getattr("name")?.cast_into::<PyString>()?;
            if !SET.contains(&name.to_str()?) {
                defaults.push((name.unbind(), field.getattr("default")?.unbind()));
            }
        }
        let form = core.getattr("Form")?;
        Ok(Requests {
            class: class.unbind(),
            defaults,
            dtypes: dtypes(py)?,
            tensors: form.getattr("TENSORS")?.unbind(),
            raw: form.getattr("TENSORS_RAW")?.unbind(),
            tensor: form.getattr("TENSOR")?.unbind(),
        })
    }

    /// The request that was found in a message; its bytes are there as long as `owner` is.
    pub fn openinference<'py>(
        &self,
        found: &openinference::Request<'_>,
        owner: &Bound<'py, PyAny>,
    ) -> Tried<Bound<'py, PyAny>> {
        let py = owner.py();
        self.request(&Facts {
            payload: self.payload(&found.inputs, owner)?.into_any(),
            form: if found.raw { &self.raw } else { &self.tensors },
            model: PyString::new(py, found.model).into_any(),
            version: found.version,
            label: "",
            signature: "",
            outputs: &found.outputs,
            names: &[],
            tags: PyDict::new(py),
            id: found.id,
        })
    }

    pub fn tfserving<'py>(
        &self,
        found: &tfserving::Request<'_>,
        owner: &Bound<'py, PyAny>,
    ) -> Tried<Bound<'py, PyAny>> {
        let py = owner.py();
        if found.outputs.len() > 1 {
            return Err(NotPlain.into()); // two may be the same
        }
        self.request(&Facts {
            payload: self.payload(&found.inputs, owner)?.into_any(),
            form: &self.tensors,
            model: PyString::new(py, found.model).into_any(),
            version: found.version,
            label: found.label,
            signature: found.signature,
            outputs: &found.outputs,
            names: &[],
            tags: PyDict::new(py),
            id: "",
        })
    }

    pub fn seldon<'py>(&self, found: &seldon::Request<'_>, owner: &Bound<'py, PyAny>) -> Tried<Bound<'py, PyAny>> {
        let py = owner.py();
        let tags = PyDict::new(py);
        for (name, tag) in &found.tags {
            match *tag {
                Tag::Null => tags.set_item(name, py.None())?,
                Tag::Number(number) => tags.set_item(name, number)?,
                Tag::Text(text) => tags.set_item(name, text)?,
                Tag::Bool(value) => tags.set_item(name, value)?,
            }
        }
        self.request(&Facts {
            payload: self.array(&found.tensor, owner)?,
            form: &self.tensor,
            model: match found.model {
                None => PyString::new(py, "").into_any(),
                Some(Model::Name(name)) => PyString::new(py, name).into_any(),
                Some(Model::TaskId(id)) => PyInt::new(py, id).into_any(),
            },
            version: None,
            label: "",
            signature: "",
            outputs: &[],
            names: &found.names,
            tags,
            id: found.puid,
        })
    }

    /// A `Request`, slot by slot: its `__init__` takes twice as long.
    fn request<'py>(&self, facts: &Facts<'_, 'py>) -> Tried<Bound<'py, PyAny>> {
        let py = facts.payload.py();
        let class = self.class.bind(py).as_type_ptr();
        // Safety: what `object.__new__` does for a class with slots.
        let request = unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyType_GenericAlloc(class, 0))? };
        for (name, value) in &self.defaults {
            request.setattr(name.bind(py), value)?;
        }
        request.setattr(intern!(py, "payload"), &facts.payload)?;
        request.setattr(intern!(py, "form"), facts.form)?;
        request.setattr(intern!(py, "model"), &facts.model)?;
        request.setattr(intern!(py, "version"), facts.version)?;
        request.setattr(intern!(py, "label"), facts.label)?;
        request.setattr(intern!(py, "signature"), facts.signature)?;
        request.setattr(intern!(py, "outputs"), PyTuple::new(py, facts.outputs)?)?;
        request.setattr(intern!(py, "names"), PyTuple::new(py, facts.names)?)?;
        request.setattr(intern!(py, "tags"), &facts.tags)?;
        request.setattr(intern!(py, "parameters"), PyDict::new(py))?;
        request.setattr(intern!(py, "id"), facts.id)?;
        Ok(request)
    }

    fn payload<'py>(&self, tensors: &[Tensor<'_>], owner: &Bound<'py, PyAny>) -> Tried<Bound<'py, PyDict>> {
        let payload = PyDict::new(owner.py());
        for tensor in tensors {
            payload.set_item(tensor.name, self.array(tensor, owner)?)?;
        }
        // Of two of the same name the core's codecs refuse the request, or take the last one.
        if payload.len() == tensors.len() { Ok(payload) } else { Err(NotPlain.into()) }
    }

    /// The tensor as a read-only view of its bytes, which are there as long as `owner` is; or as a copy.
    fn array<'py>(&self, tensor: &Tensor<'_>, owner: &Bound<'py, PyAny>) -> Tried<Bound<'py, PyAny>> {
        let size = tensor.size();
        if let Some(bytes) = tensor.in_place() {
            let aligned = bytes.as_ptr().addr() % tensor.dtype.size().min(8) == 0;
            // torch takes an array that is not aligned, but its kernels may be compiled for those that are.
            if size > 0 && aligned {
                let array = self.new_array(owner.py(), tensor, bytes.as_ptr().cast_mut())?;
                let array_ptr = array.as_ptr().cast::<PyArrayObject>();
                // Safety: it is an array, and takes over one reference to its base.
                let set =
                    unsafe { PY_ARRAY_API.PyArray_SetBaseObject(owner.py(), array_ptr, owner.clone().into_ptr()) };
                return if set < 0 { Err(PyErr::fetch(owner.py()).into()) } else { Ok(array) };
            }
        }
        let array = self.new_array(owner.py(), tensor, std::ptr::null_mut())?;
        // Safety: the array is new, contiguous, of that size, and nobody else has it.
        let out = unsafe {
            let data = (*array.as_ptr().cast::<PyArrayObject>()).fields.data;
            std::slice::from_raw_parts_mut(data.cast::<u8>(), size)
        };
        if size >= LARGE {
            owner.py().detach(|| tensor.copy_to(out))?;
        } else {
            tensor.copy_to(out)?;
        }
        Ok(array)
    }

    /// A read-only array of the bytes at `data`; or, where that is null, a new one whose bytes are not set.
    fn new_array<'py>(&self, py: Python<'py>, tensor: &Tensor<'_>, data: *mut u8) -> PyResult<Bound<'py, PyAny>> {
        let dtype = self.dtypes.get(tensor.dtype as usize).ok_or_else(|| PyTypeError::new_err("an unknown dtype"))?;
        let dtype = dtype.bind(py).clone().into_dtype_ptr();
        let sizes = tensor.shape.sizes();
        // Safety: `dtype` is a new reference, which numpy takes over; the sizes are of numpy's own type, and only read.
        unsafe {
            Bound::from_owned_ptr_or_err(
                py,
                PY_ARRAY_API.PyArray_NewFromDescr(
                    py,
                    get_type_object(py, NpyTypes::PyArray_Type),
                    dtype,
                    sizes.len() as i32,
                    sizes.as_ptr().cast_mut(),
                    std::ptr::null_mut(),
                    data.cast(),
                    0,
                    std::ptr::null_mut(),
                ),
            )
        }
    }
}

fn dtypes(py: Python<'_>) -> PyResult<Vec<Py<PyArrayDescr>>> {
    let bfloat16 = py.import("ml_dtypes")?.getattr("bfloat16")?;
    let dtypes = Dtype::ALL.into_iter().map(|dtype| match dtype {
        Dtype::Bf16 => Ok(PyArrayDescr::new(py, &bfloat16)?.unbind()),
        _ => Ok(PyArrayDescr::new(py, dtype.name())?.unbind()),
    });
    dtypes.collect()
}
