//! AVX2 and AVX-512.
//!
//! Intrinsics that touch no memory are safe where their instructions are known to exist; what is
//! left to argue is that, and the pointers of loads and stores.
#![expect(unsafe_code, reason = "intrinsics")]

/// Whether [`avx2`] runs here.
pub(super) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// Whether [`avx512`] runs here.
pub(super) fn has_avx512() -> bool {
    has_avx2() && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq")
}

/// The passes, and the operations of [`super::body::Lanes`], with some features on. The functions of
/// the invoking module have the operations' names.
macro_rules! level {
    ($name:ident, $vector:ty, $features:literal) => {
        /// Exists only inside functions that have the features.
        #[derive(Clone, Copy)]
        struct $name(());

        pub(in crate::cpu::simd) fn largest<T: Element>(values: &[T]) -> f32 {
            #[target_feature(enable = $features)]
            fn pass<T: Element>(values: &[T]) -> f32 {
                body::largest($name(()), values)
            }
            // SAFETY: this level is chosen only where its features were detected.
            unsafe { pass(values) }
        }

        pub(in crate::cpu::simd) fn sum_exp<T: Element>(
            row: &[T],
            bounds: &[u32],
            shift: f32,
            out: &mut [f64],
            ahead: usize,
        ) -> bool {
            #[target_feature(enable = $features)]
            fn pass<T: Element>(
                row: &[T],
                bounds: &[u32],
                shift: f32,
                out: &mut [f64],
                ahead: usize,
            ) -> bool {
                body::sum_exp($name(()), row, bounds, shift, out, ahead)
            }
            // SAFETY: as in `largest`.
            unsafe { pass(row, bounds, shift, out, ahead) }
        }

        pub(in crate::cpu::simd) fn scale_exp<T: Element>(row: &mut [T], pieces: &[Piece]) {
            #[target_feature(enable = $features)]
            fn pass<T: Element>(row: &mut [T], pieces: &[Piece]) {
                body::scale_exp($name(()), row, pieces);
            }
            // SAFETY: as in `largest`.
            unsafe { pass(row, pieces) }
        }

        pub(in crate::cpu::simd) fn above<T: Element>(
            row: &[T],
            start: usize,
            threshold: f32,
            found: &mut Vec<u32>,
        ) {
            #[target_feature(enable = $features)]
            fn pass<T: Element>(row: &[T], start: usize, threshold: f32, found: &mut Vec<u32>) {
                body::above($name(()), row, start, threshold, found);
            }
            // SAFETY: as in `largest`.
            unsafe { pass(row, start, threshold, found) }
        }

        impl Lanes for $name {
            type V = $vector;
            level!(@forward $vector;
                splat(value: f32) -> $vector;
                add(a: $vector, b: $vector) -> $vector;
                sub(a: $vector, b: $vector) -> $vector;
                mul(a: $vector, b: $vector) -> $vector;
                mul_add(a: $vector, b: $vector, c: $vector) -> $vector;
                max(a: $vector, b: $vector) -> $vector;
                from(value: $vector, floor: $vector) -> $vector;
                above(a: $vector, b: $vector) -> u32;
                exp2(x: $vector) -> $vector;
                sum(value: $vector) -> f32;
                largest(value: $vector) -> f32;
            );

            #[inline(always)]
            fn load<T: Element>(self, from: &[T; LANES]) -> $vector {
                // SAFETY: `self` exists only where the features do.
                unsafe { ops::load(from) }
            }

            #[inline(always)]
            fn ahead<T: Element>(self, of: &[T; LANES], bytes: usize) {
                let place = of.as_ptr().wrapping_byte_add(bytes);
                // SAFETY: any address may be asked for; where there is nothing, nothing happens.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast()) };
            }

            #[inline(always)]
            fn load_some<T: Element>(self, from: &[T]) -> $vector {
                // SAFETY: as in `load`.
                unsafe { ops::load_some(from) }
            }

            #[inline(always)]
            fn store<T: Element>(self, to: &mut [T; LANES], value: $vector) {
                // SAFETY: as in `load`.
                unsafe { ops::store(to, value) }
            }

            #[inline(always)]
            fn store_some<T: Element>(self, to: &mut [T], value: $vector) {
                // SAFETY: as in `load`.
                unsafe { ops::store_some(to, value) }
            }
        }
    };
    (@forward $vector:ty; $($name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {$(
        #[inline(always)]
        fn $name(self, $($argument: $kind),*) -> $result {
            // SAFETY: `self` exists only where the features do.
            unsafe { ops::$name($($argument),*) }
        }
    )*};
}

pub(super) mod avx512 {
    //! 16 lanes in one register.

    use crate::cpu::simd::body::{self, Lanes};
    use crate::cpu::simd::{LANES, Piece};
    use crate::element::Element;
    use std::arch::x86_64::{__m512, _MM_HINT_T0, _mm_prefetch};

    level!(Avx512, __m512, "avx2,fma,f16c,avx512f,avx512dq");

    mod ops {
        use crate::cpu::simd::LANES;
        use crate::cpu::simd::body::EXP2;
        use crate::element::{Dtype, Element};
        #[cfg_attr(
            not(test),
            expect(clippy::wildcard_imports, reason = "thirty intrinsics")
        )]
        use std::arch::x86_64::*;

        /// The first so many lanes.
        const MASKS: [u16; LANES + 1] = {
            let mut masks = [0; LANES + 1];
            let mut count = 1;
            while count <= LANES {
                masks[count] = masks[count - 1] << 1 | 1;
                count += 1;
            }
            masks
        };

        macro_rules! ops {
            ($($name:ident($($argument:ident: $kind:ty),*) -> $result:ty = $value:expr;)*) => {$(
                #[target_feature(enable = "avx512f,avx512dq")]
                #[inline]
                pub(super) fn $name($($argument: $kind),*) -> $result {
                    $value
                }
            )*};
        }

        ops! {
            splat(value: f32) -> __m512 = _mm512_set1_ps(value);
            add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
            sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
            mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
            mul_add(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
            max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
            from(value: __m512, floor: __m512) -> __m512 = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(value, floor), value);
            above(a: __m512, b: __m512) -> u32 = u32::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b));
            sum(value: __m512) -> f32 = _mm512_reduce_add_ps(value);
            largest(value: __m512) -> f32 = _mm512_reduce_max_ps(value);
        }

        #[target_feature(enable = "avx512f,avx512dq")]
        #[inline]
        pub(super) fn exp2(x: __m512) -> __m512 {
            // The distance to the nearest integer, which `scalef` is given as the exponent.
            let whole = _mm512_roundscale_ps::<0>(x);
            let r = _mm512_sub_ps(x, whole);
            let mut p = _mm512_set1_ps(EXP2[5]);
            for power in (0..5).rev() {
                p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP2[power]));
            }
            let kept = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, _mm512_set1_ps(-126.0));
            _mm512_maskz_scalef_ps(kept, p, whole)
        }

        #[target_feature(enable = "avx512f,avx512dq")]
        #[inline]
        pub(super) fn load<T: Element>(from: &[T; LANES]) -> __m512 {
            match T::DTYPE {
                // SAFETY: 16 values of 4 bytes are there.
                Dtype::F32 => unsafe { _mm512_loadu_ps(from.as_ptr().cast()) },
                Dtype::Bf16 => {
                    // SAFETY: 16 values of 2 bytes are there.
                    let half = unsafe { _mm256_loadu_si256(from.as_ptr().cast()) };
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
                }
                Dtype::F16 => {
                    // SAFETY: 16 values of 2 bytes are there.
                    let half = unsafe { _mm256_loadu_si256(from.as_ptr().cast()) };
                    _mm512_cvtph_ps(half)
                }
            }
        }

        #[target_feature(enable = "avx512f,avx512dq")]
        #[inline]
        pub(super) fn load_some<T: Element>(from: &[T]) -> __m512 {
            let count = from.len().min(LANES);
            let mask = MASKS[count];
            let fill = _mm512_set1_ps(f32::MIN);
            if T::DTYPE == Dtype::F32 {
                // SAFETY: lanes beyond the slice are masked, and masked lanes are not read.
                return unsafe { _mm512_mask_loadu_ps(fill, mask, from.as_ptr().cast()) };
            }
            let mut values = [T::default(); LANES];
            values[..count].copy_from_slice(&from[..count]);
            _mm512_mask_mov_ps(fill, mask, load(&values))
        }

        #[target_feature(enable = "avx512f,avx512dq")]
        #[inline]
        pub(super) fn store<T: Element>(to: &mut [T; LANES], value: __m512) {
            match T::DTYPE {
                // SAFETY: there is room for 16 values of 4 bytes.
                Dtype::F32 => unsafe { _mm512_storeu_ps(to.as_mut_ptr().cast(), value) },
                Dtype::Bf16 => {
                    let half = _mm512_cvtepi32_epi16(bf16_of(value));
                    // SAFETY: there is room for 16 values of 2 bytes.
                    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), half) };
                }
                Dtype::F16 => {
                    let half = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value);
                    // SAFETY: there is room for 16 values of 2 bytes.
                    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), half) };
                }
            }
        }

        #[target_feature(enable = "avx512f,avx512dq")]
        #[inline]
        pub(super) fn store_some<T: Element>(to: &mut [T], value: __m512) {
            let mut values = [T::default(); LANES];
            store(&mut values, value);
            let count = to.len().min(LANES);
            to[..count].copy_from_slice(&values[..count]);
        }

        /// The upper half of each value, rounded to nearest, ties to even; values are finite.
        #[target_feature(enable = "avx512f,avx512dq")]
        #[inline]
        fn bf16_of(value: __m512) -> __m512i {
            let bits = _mm512_castps_si512(value);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half))
        }
    }
}

pub(super) mod avx2 {
    //! 16 lanes in two registers.

    use crate::cpu::simd::body::{self, Lanes};
    use crate::cpu::simd::{LANES, Piece};
    use crate::element::Element;
    use std::arch::x86_64::{__m256, _MM_HINT_T0, _mm_prefetch};

    level!(Avx2, [__m256; 2], "avx2,fma,f16c");

    mod ops {
        use crate::cpu::simd::LANES;
        use crate::cpu::simd::body::EXP2;
        use crate::element::{Dtype, Element};
        #[cfg_attr(
            not(test),
            expect(clippy::wildcard_imports, reason = "thirty intrinsics")
        )]
        use std::arch::x86_64::*;

        type V = [__m256; 2];

        macro_rules! ops {
            ($($name:ident($($argument:ident: $kind:ty),*) -> $result:ty = $value:expr;)*) => {$(
                #[target_feature(enable = "avx2,fma,f16c")]
                #[inline]
                pub(super) fn $name($($argument: $kind),*) -> $result {
                    $value
                }
            )*};
        }

        ops! {
            splat(value: f32) -> V = [_mm256_set1_ps(value); 2];
            add(a: V, b: V) -> V = [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])];
            sub(a: V, b: V) -> V = [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])];
            mul(a: V, b: V) -> V = [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])];
            mul_add(a: V, b: V, c: V) -> V = [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])];
            max(a: V, b: V) -> V = [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])];
            from(value: V, floor: V) -> V = [from_of(value[0], floor[0]), from_of(value[1], floor[1])];
            above(a: V, b: V) -> u32 = above_of(a[0], b[0]) | above_of(a[1], b[1]) << 8;
            exp2(x: V) -> V = [exp2_of(x[0]), exp2_of(x[1])];
            largest(value: V) -> f32 = lanes(_mm256_max_ps(value[0], value[1])).into_iter().fold(f32::MIN, f32::max);
        }

        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline]
        pub(super) fn sum(value: V) -> f32 {
            let eight = _mm256_add_ps(value[0], value[1]);
            let four = _mm_add_ps(
                _mm256_castps256_ps128(eight),
                _mm256_extractf128_ps::<1>(eight),
            );
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }

        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline]
        fn from_of(value: __m256, floor: __m256) -> __m256 {
            _mm256_and_ps(value, _mm256_cmp_ps::<_CMP_NLT_UQ>(value, floor))
        }

        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline]
        fn above_of(a: __m256, b: __m256) -> u32 {
            _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b)).cast_unsigned()
        }

        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline]
        fn lanes(value: __m256) -> [f32; 8] {
            let mut lanes = [0.0; 8];
            // SAFETY: there is room for 8 values of 4 bytes.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), value) };
            lanes
        }

        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline]
        fn exp2_of(x: __m256) -> __m256 {
            let least = _mm256_set1_ps(-126.0);
            let kept = _mm256_max_ps(x, least);
            let whole = _mm256_cvtps_epi32(kept);
            let r = _mm256_sub_ps(kept, _mm256_cvtepi32_ps(whole));
            let mut p = _mm256_set1_ps(EXP2[5]);
            for power in (0..5).rev() {
                p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP2[power]));
            }
            let exponent = _mm256_slli_epi32::<23>(_mm256_add_epi32(whole, _mm256_set1_epi32(127)));
            let scaled = _mm256_mul_ps(p, _mm256_castsi256_ps(exponent));
            let scaled = _mm256_and_ps(scaled, _mm256_cmp_ps::<_CMP_GE_OQ>(x, least));
            let beyond = _mm256_cmp_ps::<_CMP_GT_OQ>(x, _mm256_set1_ps(127.0));
            _mm256_blendv_ps(scaled, _mm256_set1_ps(f32::INFINITY), beyond)
        }

        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline]
        pub(super) fn load<T: Element>(from: &[T; LANES]) -> V {
            let (halves, _) = from.as_chunks::<8>();
            [load_half(&halves[0]), load_half(&halves[1])]
        }

        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline]
        fn load_half<T: Element>(from: &[T; 8]) -> __m256 {
            match T::DTYPE {
                // SAFETY: 8 values of 4 bytes are there.
                Dtype::F32 => unsafe { _mm256_loadu_ps(from.as_ptr().cast()) },
                Dtype::Bf16 => {
                    // SAFETY: 8 values of 2 bytes are there.
                    let half = unsafe { _mm_loadu_si128(from.as_ptr().cast()) };
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
                }
                Dtype::F16 => {
                    // SAFETY: 8 values of 2 bytes are there.
                    let half = unsafe { _mm_loadu_si128(from.as_ptr().cast()) };
                    _mm256_cvtph_ps(half)
                }
            }
        }

        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline]
        pub(super) fn load_some<T: Element>(from: &[T]) -> V {
            let mut values = [f32::MIN; LANES];
            for (value, from) in values.iter_mut().zip(from) {
                *value = from.to_f32();
            }
            load(&values)
        }

        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline]
        pub(super) fn store<T: Element>(to: &mut [T; LANES], value: V) {
            let (halves, _) = to.as_chunks_mut::<8>();
            for (half, value) in halves.iter_mut().zip(value) {
                store_half(half, value);
            }
        }

        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline]
        fn store_half<T: Element>(to: &mut [T; 8], value: __m256) {
            match T::DTYPE {
                // SAFETY: there is room for 8 values of 4 bytes.
                Dtype::F32 => unsafe { _mm256_storeu_ps(to.as_mut_ptr().cast(), value) },
                Dtype::Bf16 => *to = lanes(value).map(T::from_f32),
                Dtype::F16 => {
                    let half = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value);
                    // SAFETY: there is room for 8 values of 2 bytes.
                    unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), half) };
                }
            }
        }

        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline]
        pub(super) fn store_some<T: Element>(to: &mut [T], value: V) {
            let mut values = [T::default(); LANES];
            store(&mut values, value);
            let count = to.len().min(LANES);
            to[..count].copy_from_slice(&values[..count]);
        }
    }
}
