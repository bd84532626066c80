//! Parameters in flat buffers: one bank per block, with the Hugging Face name and place of each tensor.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Storage, Tensor, Var, bail};
use consilium_kernels::quant::Format;

use super::frozen::{Base, Frozen, OffloadFile};

/// One named tensor of a bank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) start: usize,
}

impl Slot {
    /// Values of this tensor inside the bank.
    pub(crate) fn range(&self) -> Range<usize> {
        self.start..self.start + self.shape.iter().product::<usize>()
    }
}

/// Lays tensors one after another.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    slots: Vec<Slot>,
    len: usize,
}

impl Plan {
    /// Appends a tensor and returns its offset.
    pub(crate) fn push(&mut self, name: String, shape: &[usize]) -> usize {
        let start = self.len;
        self.slots.push(Slot {
            name,
            shape: shape.to_vec(),
            start,
        });
        self.len += shape.iter().product::<usize>();
        start
    }

    /// Values so far: the offset of the next tensor.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The tensors, without a place for their values.
    pub(crate) fn into_slots(self) -> Vec<Slot> {
        self.slots
    }

    /// Allocates the bank and lets `fill` write each tensor.
    pub(crate) fn build<E: From<candle_core::Error>>(
        self,
        mut fill: impl FnMut(&Slot, &mut [f32]) -> Result<(), E>,
    ) -> Result<Bank, E> {
        let mut values = vec![0f32; self.len];
        for slot in &self.slots {
            fill(slot, &mut values[slot.range()])?;
        }
        let values = Tensor::from_vec(values, self.len, &Device::Cpu)?;
        Ok(Bank {
            slots: self.slots,
            values: Values::Floats(values),
        })
    }
}

/// Where the values of a bank are.
#[derive(Debug, Clone)]
pub(crate) enum Values {
    /// A flat tensor, a candle variable if trainable.
    Floats(Tensor),
    /// In fewer bits or in a file, never trained.
    Frozen(Arc<Frozen>),
}

impl Values {
    /// Lends the weights.
    pub(crate) fn lend<R>(&self, f: impl FnOnce(Base<'_>) -> R) -> candle_core::Result<R> {
        match self {
            Self::Floats(tensor) => with_floats(tensor, |values| f(Base::Floats(values))),
            Self::Frozen(frozen) => frozen.lend(f),
        }
    }

    /// Number of values.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Floats(tensor) => tensor.elem_count(),
            Self::Frozen(frozen) => frozen.len(),
        }
    }

    /// Bytes that the values take, in memory or in a file.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Floats(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Self::Frozen(frozen) => frozen.bytes(),
        }
    }

    /// A flat tensor of a type on a device, without a graph: copied unless it is that already.
    pub(crate) fn on(&self, device: &Device, dtype: DType) -> candle_core::Result<Tensor> {
        let tensor = match self {
            Self::Floats(tensor) => tensor.detach(),
            Self::Frozen(frozen) => Tensor::from_vec(frozen.decode()?, frozen.len(), &Device::Cpu)?,
        };
        tensor.to_dtype(dtype)?.to_device(device)
    }

    /// Reads the values, decoded where they are stored otherwise.
    pub(crate) fn read<R>(&self, f: impl FnOnce(&[f32]) -> R) -> candle_core::Result<R> {
        match self {
            Self::Floats(tensor) => with_floats(tensor, f),
            Self::Frozen(frozen) => Ok(f(&frozen.decode()?)),
        }
    }

    /// The matrices in another format or in a file; they can then only be read.
    pub(crate) fn stored(
        &self,
        slots: &[Slot],
        format: Format,
        file: Option<&Arc<OffloadFile>>,
    ) -> candle_core::Result<Self> {
        if format == Format::F32 && file.is_none() {
            return Ok(self.clone());
        }
        let frozen = self.read(|values| Frozen::new(slots, values, format, file))??;
        Ok(Self::Frozen(Arc::new(frozen)))
    }
}

/// Tensors in one flat buffer, trained together or not at all.
#[derive(Debug)]
pub(crate) struct Bank {
    slots: Vec<Slot>,
    values: Values,
}

impl Bank {
    /// Tensors in order of their place.
    pub(crate) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Number of values.
    pub(crate) fn len(&self) -> usize {
        self.values.len()
    }

    /// Where the values are.
    pub(crate) fn values(&self) -> &Values {
        &self.values
    }

    /// The flat tensor, a candle variable if trainable.
    pub(crate) fn tensor(&self) -> candle_core::Result<&Tensor> {
        match &self.values {
            Values::Floats(tensor) => Ok(tensor),
            Values::Frozen(_) => bail!(
                "{} is stored in fewer bits or in a file; to train it, load the model as f32",
                self.name()
            ),
        }
    }

    /// Whether candle tracks gradients of this bank.
    pub(crate) fn is_trainable(&self) -> bool {
        matches!(&self.values, Values::Floats(tensor) if tensor.is_variable())
    }

    /// Makes the bank a candle variable.
    pub(crate) fn train(&mut self) -> candle_core::Result<()> {
        if !self.is_trainable() {
            let values = self.tensor()?.to_dtype(DType::F32)?;
            self.values = Values::Floats(Var::from_tensor(&values)?.into_inner());
        }
        Ok(())
    }

    /// Moves the values to a device: as f32 where they are trained, else as `dtype`. What is stored in fewer bits or in a file
    /// stays there.
    pub(crate) fn place(&mut self, device: &Device, dtype: DType) -> candle_core::Result<()> {
        let is_trainable = self.is_trainable();
        if let Values::Floats(tensor) = &mut self.values {
            let dtype = if is_trainable { DType::F32 } else { dtype };
            let is_there = tensor.dtype() == dtype && tensor.device().same_device(device);
            if !is_there {
                let moved = tensor.detach().to_dtype(dtype)?.to_device(device)?;
                *tensor = if is_trainable {
                    Var::from_tensor(&moved)?.into_inner()
                } else {
                    moved
                };
            }
        }
        Ok(())
    }

    /// Stops training: the values stay.
    pub(crate) fn freeze(&mut self) {
        if let Values::Floats(tensor) = &mut self.values {
            *tensor = tensor.detach();
        }
    }

    /// Stores the matrices in another format or in a file; they can then only be read.
    pub(crate) fn store(
        &mut self,
        format: Format,
        file: Option<&Arc<OffloadFile>>,
    ) -> candle_core::Result<()> {
        self.values = self.values.stored(&self.slots, format, file)?;
        Ok(())
    }

    /// A copy that shares nothing that can change.
    pub(crate) fn duplicate(&self) -> candle_core::Result<Self> {
        let values = match &self.values {
            Values::Frozen(frozen) => Values::Frozen(Arc::clone(frozen)),
            Values::Floats(tensor) => Values::Floats(tensor.detach().copy()?),
        };
        let mut copy = Self {
            slots: self.slots.clone(),
            values,
        };
        if self.is_trainable() {
            copy.train()?;
        }
        Ok(copy)
    }

    /// Reads the values, decoded where they are stored otherwise.
    pub(crate) fn read<R>(&self, f: impl FnOnce(&[f32]) -> R) -> candle_core::Result<R> {
        self.values.read(f)
    }

    /// Changes the values in place; tensors that share the storage see the change.
    pub(crate) fn edit(&self, f: impl FnOnce(&mut [f32])) -> candle_core::Result<()> {
        edit(self.tensor()?, f)
    }

    fn name(&self) -> &str {
        self.slots.first().map_or("", |slot| &slot.name)
    }
}

/// Lends the values of a contiguous tensor: in place where they are f32 in the host's memory, else a copy.
pub(crate) fn with_floats<R>(
    tensor: &Tensor,
    f: impl FnOnce(&[f32]) -> R,
) -> candle_core::Result<R> {
    let copy = if is_plain(tensor) {
        None
    } else {
        let there = tensor.detach().to_device(&Device::Cpu)?;
        Some(there.to_dtype(DType::F32)?)
    };
    let (storage, layout) = copy.as_ref().unwrap_or(tensor).storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(f(floats(storage, layout)?)),
        _ => bail!("the tensor is not on the CPU"),
    }
}

/// The values of a contiguous f32 storage.
pub(crate) fn floats<'a>(
    storage: &'a CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a [f32]> {
    let values = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => bail!("the tensor is not contiguous"),
    }
}

/// Whether the values are f32 in the host's memory.
pub(crate) fn is_plain(tensor: &Tensor) -> bool {
    tensor.dtype() == DType::F32 && tensor.device().is_cpu()
}

/// Changes a contiguous tensor in place, by way of a copy where the values are not f32 in the host's memory.
pub(crate) fn edit(tensor: &Tensor, f: impl FnOnce(&mut [f32])) -> candle_core::Result<()> {
    if is_plain(tensor) {
        return tensor.inplace_op1(&Edit(RefCell::new(Some(f))));
    }
    let mut values = with_floats(tensor, <[f32]>::to_vec)?;
    f(&mut values);
    let values = Tensor::from_vec(values, tensor.shape(), &Device::Cpu)?;
    let values = values
        .to_dtype(tensor.dtype())?
        .to_device(tensor.device())?;
    tensor.slice_set(&values, 0, 0)
}

struct Edit<F>(RefCell<Option<F>>);

impl<F: FnOnce(&mut [f32])> InplaceOp1 for Edit<F> {
    fn name(&self) -> &'static str {
        "edit"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("the tensor is not contiguous")
        };
        match (storage, self.0.borrow_mut().take()) {
            (CpuStorage::F32(values), Some(f)) => f(&mut values[start..end]),
            _ => bail!("expected {:?} values, once", DType::F32),
        }
        Ok(())
    }
}
