//! What is wrong with an adapter is named: tensor, institution, reason.

use consilium_protocol::manifest::Training;
use safetensors::SafeTensors;

use super::{HEAD, Q, RANK, Tensor, adapter, id, merged, serialize, tensor, training};
use crate::fusion::adapter::check::check_adapter;
use crate::fusion::error::{FusionError, Origin, TensorProblem};

fn checked(training: &Training, start: &[u8], who: &str, bytes: &[u8]) -> Result<(), FusionError> {
    let folder = tempfile::tempdir().unwrap();
    let [before, adapter] = ["start", "adapter"].map(|name| folder.path().join(name));
    std::fs::write(&before, start).unwrap();
    std::fs::write(&adapter, bytes).unwrap();
    check_adapter(training, &before, &id(who), &adapter).map(|_| ())
}

/// The file with one tensor replaced, or left out.
fn altered(bytes: &[u8], name: &str, new: Option<&(Vec<usize>, Vec<f32>)>) -> Vec<u8> {
    let parsed = SafeTensors::deserialize(bytes).unwrap();
    let outputs: Vec<_> = parsed
        .tensors()
        .into_iter()
        .filter_map(|(n, view)| {
            let (shape, data) = match new {
                Some((shape, values)) if n == name => (
                    shape.clone(),
                    values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                ),
                None if n == name => return None,
                _ => (view.shape().to_vec(), view.data().to_vec()),
            };
            Some(Tensor {
                name: n,
                shape,
                data,
            })
        })
        .collect();
    serialize(&outputs)
}

#[test]
fn a_bad_tensor_is_refused_by_name_and_institution() {
    let t = training(700, 700);
    let (start, good) = (adapter(1, 0.2), adapter(2, 0.3));
    let a = format!("{Q}.lora_A.weight");
    let stranger = format!("{Q}.lora_C.weight");
    let mut nan = vec![0.5; RANK * 20];
    nan[7] = f32::NAN;
    let extra = {
        let mut values = altered(&good, HEAD, None);
        let parsed = SafeTensors::deserialize(&values).unwrap();
        let mut outputs: Vec<_> = parsed
            .tensors()
            .into_iter()
            .map(|(name, view)| Tensor {
                name,
                shape: view.shape().to_vec(),
                data: view.data().to_vec(),
            })
            .collect();
        let head = tensor(&good, HEAD);
        outputs.push(Tensor::matrix(HEAD.to_owned(), &head));
        outputs.push(Tensor::matrix(stranger.clone(), &head));
        values = serialize(&outputs);
        values
    };
    let cases = [
        (
            altered(&good, &a, Some(&(vec![RANK, 20], nan))),
            &a,
            TensorProblem::NotFinite(7),
        ),
        (
            altered(&good, &a, Some(&(vec![20, RANK], vec![0.5; RANK * 20]))),
            &a,
            TensorProblem::Shape {
                got: vec![20, RANK],
                expected: vec![RANK, 20],
            },
        ),
        (
            altered(&good, HEAD, None),
            &HEAD.to_owned(),
            TensorProblem::Missing,
        ),
        (extra, &stranger, TensorProblem::Unexpected),
        (
            altered(&good, HEAD, Some(&(vec![30, 20], vec![f32::INFINITY; 600]))),
            &HEAD.to_owned(),
            TensorProblem::NotFinite(0),
        ),
    ];
    for (bytes, expected_tensor, expected) in cases {
        let named = [
            ("bank", good.as_slice(), 1),
            ("clinic", bytes.as_slice(), 1),
        ];
        let merge = merged(&t, &start, None, &named).unwrap_err();
        let check = checked(&t, &start, "clinic", &bytes).unwrap_err();
        for error in [merge, check] {
            let FusionError::Tensor {
                origin,
                tensor,
                problem,
            } = error
            else {
                panic!("{error}");
            };
            assert_eq!(
                (origin, &tensor, problem),
                (
                    Origin::Institution(id("clinic")),
                    expected_tensor,
                    expected.clone()
                )
            );
        }
    }
    assert!(checked(&t, &start, "clinic", &good).is_ok());
    let twice = [("bank", good.as_slice(), 1), ("bank", good.as_slice(), 1)];
    assert!(matches!(
        merged(&t, &start, None, &twice),
        Err(FusionError::Twice(_))
    ));
    let idle = [("bank", good.as_slice(), 0)];
    assert!(matches!(
        merged(&t, &start, None, &idle),
        Err(FusionError::Nothing)
    ));
    let cut = [("bank", &good[..good.len() - 1], 1)];
    assert!(matches!(
        merged(&t, &start, None, &cut),
        Err(FusionError::Format { .. })
    ));
}
