//! What an artefact may hold to leave as its kind: nothing beside what the manifest asks for.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use consilium_protocol::evaluation::Evaluation;
use consilium_protocol::manifest::{Manifest, SymbolSpace};
use consilium_protocol::shard::{Header, Shard};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

/// Longest header of an adapter file, in bytes; the safetensors limit.
const ADAPTER_HEADER: u64 = 100_000_000;

/// Records of shard `sequence`, in the one form that such a shard has.
pub(super) fn records(manifest: &Manifest, sequence: u32, bytes: &[u8]) -> Result<Header, String> {
    let shard = Shard::parse(bytes).map_err(|error| error.to_string())?;
    let header = &shard.header;
    let dense = match header.space {
        SymbolSpace::Bytes => false,
        SymbolSpace::Tokens { size, .. } => u32::from(header.symbols) >= size,
    };
    if header.reference != manifest.reference {
        Err(format!("records of reference set {}", header.reference))
    } else if header.items() != manifest.shard_range(sequence) {
        let items = header.items();
        Err(format!("items {items:?} are not those of shard {sequence}"))
    } else if header.space != manifest.symbol_space || header.symbols != manifest.symbols {
        Err("symbols are not those of the manifest".to_owned())
    } else if dense {
        Err("the whole distribution of every position".to_owned())
    } else if !header.space.is_bytes() && !is_empty_in_token_space(&shard) {
        Err("columns end and missed, which records of tokens leave empty".to_owned())
    } else if shard.to_bytes().map_err(|error| error.to_string())? != bytes {
        Err("bytes beside the records".to_owned())
    } else {
        Ok(shard.header)
    }
}

/// Whether the columns that mean nothing in token space say nothing.
fn is_empty_in_token_space(shard: &Shard) -> bool {
    let mut codes = shard.end.iter().chain(&shard.missed);
    codes.all(|&code| code == u8::MAX)
}

/// Low-rank factors of the manifest's modules, and the modules that it saves whole. `header` is the JSON header of the
/// file, `length` the length of the whole file.
pub(super) fn adapter(manifest: &Manifest, header: &[u8], length: u64) -> Result<(), String> {
    let metadata: Metadata = serde_json::from_slice(header)
        .map_err(|error| format!("not a safetensors file: {error}"))?;
    // Length prefix, header, tensors: bytes after them would be carried along unseen.
    let size = header.len().saturating_add(8);
    let whole = metadata.data_len().saturating_add(size);
    if u64::try_from(whole).unwrap_or(u64::MAX) != length {
        return Err(format!("{length} bytes, its header accounts for {whole}"));
    }
    let texts = metadata.metadata().iter().flatten();
    for (key, value) in texts {
        if (key.as_str(), value.as_str()) != ("format", "pt") {
            return Err(format!("metadata {key:?} beside format = pt"));
        }
    }
    let mut tensors: Vec<_> = metadata.tensors().into_iter().collect();
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    match tensors
        .iter()
        .find(|(name, info)| info.dtype != Dtype::F32 || !belongs(manifest, name, &info.shape))
    {
        Some((name, info)) => Err(format!(
            "tensor {name} ({:?} {:?}) is not part of the manifest's adapter",
            info.dtype, info.shape
        )),
        None => Ok(()),
    }
}

/// The evaluation document.
pub(super) fn evaluation(bytes: &[u8]) -> Result<(), String> {
    Evaluation::parse(bytes)
        .map(|_| ())
        .map_err(|error| error.to_string())
}

/// JSON header of a safetensors file: enough to know all names and shapes. Memory does not grow with the tensors.
pub(super) fn read_header(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let mut bytes = Vec::new();
    let rest = u64::from_le_bytes(length).min(ADAPTER_HEADER);
    file.take(rest).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn belongs(manifest: &Manifest, name: &str, shape: &[usize]) -> bool {
    let training = &manifest.training;
    let rank = usize::try_from(training.rank).ok();
    let listed = |layer: &str, list: &[String]| {
        let module = layer.rsplit('.').next().unwrap_or(layer);
        list.iter().any(|listed| listed == module)
    };
    if let Some(layer) = name.strip_suffix(".lora_A.weight") {
        shape.len() == 2
            && shape.first().copied() == rank
            && listed(layer, &training.target_modules)
    } else if let Some(layer) = name.strip_suffix(".lora_B.weight") {
        shape.len() == 2 && shape.last().copied() == rank && listed(layer, &training.target_modules)
    } else {
        name.strip_suffix(".weight")
            .or_else(|| name.strip_suffix(".bias"))
            .is_some_and(|layer| listed(layer, &training.modules_to_save))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::testing::{
        adapter as example, manifest, safetensors, shard, token_shard, tokens,
    };

    fn check(bytes: &[u8]) -> Result<(), String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("adapter_model.safetensors");
        std::fs::write(&path, bytes).unwrap();
        let length = u64::try_from(bytes.len()).unwrap();
        adapter(&manifest(), &read_header(&path).unwrap(), length)
    }

    fn refused(bytes: &[u8]) -> String {
        check(bytes).expect_err("must be refused")
    }

    #[test]
    fn an_adapter_holds_nothing_but_the_manifests_modules() {
        let good = example(&manifest(), 1);
        check(&good).unwrap();

        let q = "base_model.model.model.layers.0.self_attn.q_proj";
        for (name, shape) in [
            (format!("{q}.lora_A.weight"), vec![5, 8]),
            (format!("{q}.lora_B.weight"), vec![8, 5]),
            (format!("{q}.lora_A.weight"), vec![4]),
            (format!("{q}.weight"), vec![8, 8]),
            (q.replace("q_proj", "o_proj") + ".lora_A.weight", vec![4, 8]),
            ("patients".to_owned(), vec![2]),
        ] {
            let bytes = safetensors(&[(&name, &shape)], &[]);
            assert!(refused(&bytes).contains(&name), "{name} {shape:?}");
        }
        let noted = safetensors(&[], &[("patient", "anna")]);
        assert!(refused(&noted).contains("patient"));
        let mut longer = good;
        longer.extend_from_slice(b"anna");
        assert!(refused(&longer).contains("accounts for"));
    }

    #[test]
    fn records_of_tokens_leave_where_the_manifest_says_so_and_carry_nothing_beside() {
        let manifest = tokens(manifest());
        let good = token_shard(&manifest, 0);
        let check = |manifest: &Manifest, shard: &Shard| {
            records(manifest, 0, &shard.to_bytes().unwrap()).map(|_| ())
        };
        assert_eq!(check(&manifest, &good), Ok(()));
        let refused = |shard: &Shard| check(&manifest, shard).unwrap_err();
        let mut beside = good.clone();
        beside.end[1] = 7;
        assert!(refused(&beside).contains("end and missed"));
        let mut beside = good.clone();
        beside.missed[0] = 7;
        assert!(refused(&beside).contains("end and missed"));

        // Bytes in a round of tokens, tokens in a round of bytes or of another tokenizer.
        let bytes = shard(&crate::agent::testing::manifest(), 0);
        let of_bytes = records(&manifest, 0, &bytes).unwrap_err();
        assert!(of_bytes.contains("symbols"), "{of_bytes}");
        let mut other = manifest.clone();
        for space in [
            SymbolSpace::Bytes,
            SymbolSpace::Tokens {
                tokenizer: consilium_protocol::Digest::of(b"other"),
                size: 320,
            },
        ] {
            other.symbol_space = space;
            assert!(check(&other, &good).unwrap_err().contains("symbols"));
        }
        let mut longer = good.to_bytes().unwrap();
        longer.push(0);
        assert!(records(&manifest, 0, &longer).is_err());
    }

    #[test]
    fn records_are_those_of_the_shard_and_nothing_else() {
        let good = shard(&manifest(), 0);
        records(&manifest(), 0, &good).unwrap();
        assert!(
            records(&manifest(), 1, &good)
                .unwrap_err()
                .contains("shard 1")
        );
        let mut other = manifest();
        other.symbols = 8;
        assert!(records(&other, 0, &good).unwrap_err().contains("symbols"));
        let mut other = manifest();
        other.reference = consilium_protocol::Digest::of(b"other");
        assert!(records(&other, 0, &good).unwrap_err().contains("reference"));

        // The same shard with another text in its metadata.
        let (length, rest) = good.split_first_chunk::<8>().unwrap();
        let split = usize::try_from(u64::from_le_bytes(*length)).unwrap();
        let (header, tensors) = rest.split_at(split);
        let header = std::str::from_utf8(header).unwrap().trim_end();
        let header = header.replacen(
            "{\"__metadata__\":{",
            "{\"__metadata__\":{\"x\":\"anna\",",
            1,
        );
        let mut stowaway = u64::try_from(header.len()).unwrap().to_le_bytes().to_vec();
        stowaway.extend_from_slice(header.as_bytes());
        stowaway.extend_from_slice(tensors);
        let refused = records(&manifest(), 0, &stowaway).unwrap_err();
        assert!(refused.contains("beside"), "{refused}");
    }
}
