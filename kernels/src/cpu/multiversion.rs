//! One body, compiled for several instruction sets; the machine's best is chosen when it is called.

/// Defines a function whose body is compiled three times on x86-64: for AVX-512, for AVX2, and for
/// the baseline. The results are the same: bodies keep the order of their floating-point sums, and
/// Rust contracts no products. A body may ask for a contraction by `mul_add`, which is one instruction
/// in both of the first and a slow call of a library, with the same result, in the baseline.
///
/// What a body calls must be `#[inline(always)]`: only code inlined here is compiled so.
macro_rules! multiversion {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident$(<$t:ident: $bound:path>)?($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? $body:block
    ) => {
        $(#[$meta])*
        $vis fn $name$(<$t: $bound>)?($($arg: $type),*) $(-> $ret)? {
            #[inline(always)]
            fn body$(<$t: $bound>)?($($arg: $type),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512cd,fma,bmi1,bmi2,lzcnt,popcnt")]
                fn avx512$(<$t: $bound>)?($($arg: $type),*) $(-> $ret)? {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
                fn avx2$(<$t: $bound>)?($($arg: $type),*) $(-> $ret)? {
                    body($($arg),*)
                }
                let level = $crate::cpu::multiversion::level();
                if level == $crate::cpu::multiversion::Level::Avx512 {
                    #[expect(unsafe_code, reason = "calls a function of an instruction set that was found")]
                    // SAFETY: the level says that the machine has these instructions.
                    return unsafe { avx512($($arg),*) };
                }
                if level == $crate::cpu::multiversion::Level::Avx2 {
                    #[expect(unsafe_code, reason = "calls a function of an instruction set that was found")]
                    // SAFETY: the level says that the machine has these instructions.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use multiversion;

/// Instruction sets that bodies are compiled for.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    Avx512,
    Avx2,
    Baseline,
}

/// What this machine has, found once.
#[cfg(target_arch = "x86_64")]
pub(crate) fn level() -> Level {
    static FOUND: std::sync::LazyLock<Level> = std::sync::LazyLock::new(|| {
        let common = is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("lzcnt")
            && is_x86_feature_detected!("popcnt");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512cd");
        if common && avx512 {
            Level::Avx512
        } else if common && is_x86_feature_detected!("avx2") {
            Level::Avx2
        } else {
            Level::Baseline
        }
    });
    *FOUND
}
