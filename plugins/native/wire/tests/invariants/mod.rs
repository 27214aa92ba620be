//! What holds of any bytes; for the test with random bytes and for the fuzzer.

use dl_inference_wire::{KeyFields, Model, Tensor, Version, find_key, openinference, seldon, tfserving, well_formed};

pub fn name_and_text() -> KeyFields {
    KeyFields { model: vec![1], version: vec![2], queueing: 4, ..KeyFields::default() }
}

pub fn model_spec() -> KeyFields {
    KeyFields { model: vec![1, 1], version: vec![1, 2, 1], label: vec![1, 4], ..KeyFields::default() }
}

pub fn task_id() -> KeyFields {
    KeyFields { tags: vec![2, 2], task: "taskId".into(), ..KeyFields::default() }
}

/// Returns how many of the three protocols take `body` for a plain request.
pub fn check(body: &[u8]) -> usize {
    let sound = well_formed(body);
    for fields in [name_and_text(), model_spec(), task_id()] {
        if find_key(&fields, body).is_some() {
            assert!(sound, "a key in {body:?}");
        }
    }
    let mut plain = 0;
    if let Ok(request) = openinference::decode(body) {
        assert!(sound);
        plain += 1;
        request.inputs.iter().for_each(check_tensor);
        if let Some(key) = find_key(&name_and_text(), body) {
            assert_eq!((key.model, key.queueing), (Model::Name(request.model), false));
            let text = if let Some(Version::Text(text)) = key.version { Some(text) } else { None };
            assert_eq!(text.map(|text| text.parse().ok()), Some(request.version));
        }
    }
    if let Ok(request) = tfserving::decode(body) {
        assert!(sound || body.is_empty());
        plain += usize::from(!request.inputs.is_empty());
        request.inputs.iter().for_each(check_tensor);
        if let Some(key) = find_key(&model_spec(), body) {
            assert_eq!((key.model, key.label), (Model::Name(request.model), request.label));
            assert_eq!(key.version, request.version.map(Version::Number));
        }
    }
    if let Ok(request) = seldon::decode(body) {
        assert!(sound);
        plain += 1;
        check_tensor(&request.tensor);
        if let Some(key) = find_key(&task_id(), body) {
            assert_eq!(Some(key.model), request.model);
        }
    }
    plain
}

fn check_tensor(tensor: &Tensor<'_>) {
    let count: isize = tensor.shape.sizes().iter().product();
    assert_eq!(tensor.size(), count as usize * tensor.dtype.size());
    let mut out = vec![0; tensor.size()];
    if tensor.copy_to(&mut out).is_ok() {
        assert!(tensor.in_place().is_none_or(|bytes| bytes == out));
    }
}
