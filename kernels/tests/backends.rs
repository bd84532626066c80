//! Which implementations this machine has, and that every one of them scores alike.
#![cfg(test)]

use consilium_kernels::{Backend, CudaError, TokenKind, Vocab};

#[test]
fn an_absent_backend_says_why_and_errs() {
    for (backend, reason) in Backend::absent() {
        println!("NOT TESTED: {backend:?}, {reason}");
        let vocab = Vocab::new([TokenKind::Bytes(b"a"), TokenKind::EndOfRecord]).unwrap();
        let refused = backend.token_bits(&vocab, &[0], &[0.0; 4]).unwrap_err();
        assert_eq!(refused.to_string(), reason.to_string());
        assert!(!Backend::present().contains(&backend));
        if cfg!(not(feature = "cuda")) {
            assert_eq!(reason, CudaError::NotBuilt);
        }
    }
}

#[test]
fn every_backend_present_gives_the_same_bits() {
    let vocab = Vocab::new([
        TokenKind::Bytes(b"a"),
        TokenKind::Bytes(b"ab"),
        TokenKind::EndOfRecord,
    ])
    .unwrap();
    assert!(Backend::present().contains(&Backend::best()));
    for backend in Backend::present() {
        // Both rows are uniform over three tokens.
        let bits = backend.token_bits(&vocab, &[1], &[2.5; 6]).unwrap();
        assert!(
            (bits - 2.0 * 3.0_f64.log2()).abs() < 1e-5,
            "{backend:?}: {bits}"
        );
    }
}
