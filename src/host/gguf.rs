//! GGUF files: typed access to metadata and tensors.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{Device, Tensor};

use super::{HostError, HostResult};

/// An open GGUF file: metadata in memory, tensors read when asked for.
pub struct Gguf {
    path: PathBuf,
    content: Content,
    file: BufReader<File>,
}

impl Gguf {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// [`HostError::Read`] when the file cannot be opened, [`HostError::Gguf`] when it is no GGUF file.
    pub fn open(path: impl AsRef<Path>) -> HostResult<Self> {
        let path = path.as_ref().to_path_buf();
        let file = File::open(&path).map_err(|source| HostError::Read { path: path.clone(), source })?;
        let mut file = BufReader::new(file);
        let content = Content::read(&mut file)
            .map_err(|error| HostError::Gguf { path: path.clone(), reason: error.to_string() })?;
        Ok(Self { path, content, file })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A metadata value.
    #[must_use]
    pub fn value(&self, field: &str) -> Option<&Value> {
        self.content.metadata.get(field)
    }

    /// A text, or `None` when the field is absent.
    ///
    /// # Errors
    /// [`HostError::Field`] when it is no text.
    pub fn text(&self, field: &str) -> HostResult<Option<&str>> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(field, other, "a text")),
        }
    }

    /// A count, or `None` when the field is absent. Per-layer arrays of equal numbers count as that number.
    ///
    /// # Errors
    /// [`HostError::Field`] when it is no count.
    pub fn count(&self, field: &str) -> HostResult<Option<usize>> {
        let refuse = |value: &Value| wrong_type(field, value, "a non-negative integer");
        let one = |value: &Value| -> HostResult<usize> {
            if let Ok(x) = value.to_u64() {
                return usize::try_from(x).map_err(|_| refuse(value));
            }
            match value {
                Value::I32(x) => usize::try_from(*x).map_err(|_| refuse(value)),
                Value::I64(x) => usize::try_from(*x).map_err(|_| refuse(value)),
                _ => Err(refuse(value)),
            }
        };
        match self.value(field) {
            None => Ok(None),
            Some(value @ Value::Array(items)) => {
                let counts = items.iter().map(one).collect::<HostResult<Vec<_>>>()?;
                match counts.split_first() {
                    Some((first, rest)) if rest.iter().all(|c| c == first) => Ok(Some(*first)),
                    _ => Err(wrong_type(field, value, "the same number in every layer")),
                }
            }
            Some(value) => one(value).map(Some),
        }
    }

    /// A count that has to be there.
    ///
    /// # Errors
    /// [`HostError::Field`].
    pub fn required_count(&self, field: &str) -> HostResult<usize> {
        self.count(field)?.ok_or_else(|| HostError::field(field, "missing", "a non-negative integer"))
    }

    /// A number, or `None` when the field is absent.
    ///
    /// # Errors
    /// [`HostError::Field`] when it is no finite number.
    pub fn number(&self, field: &str) -> HostResult<Option<f64>> {
        let number = match self.value(field) {
            None => return Ok(None),
            Some(Value::F32(x)) => f64::from(*x),
            Some(Value::F64(x)) => *x,
            Some(other) => return Err(wrong_type(field, other, "a number")),
        };
        if number.is_finite() {
            Ok(Some(number))
        } else {
            Err(HostError::field(field, number, "a finite number"))
        }
    }

    /// A truth value, or `None` when the field is absent.
    ///
    /// # Errors
    /// [`HostError::Field`] when it is neither true nor false.
    pub fn flag(&self, field: &str) -> HostResult<Option<bool>> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(wrong_type(field, other, "true or false")),
        }
    }

    /// A list, or `None` when the field is absent.
    ///
    /// # Errors
    /// [`HostError::Field`] when it is no list.
    pub fn list(&self, field: &str) -> HostResult<Option<&[Value]>> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(wrong_type(field, other, "a list")),
        }
    }

    /// Whether the file holds a tensor of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// A quantised tensor of the given shape (rows first).
    ///
    /// # Errors
    /// [`HostError::Tensor`] when it is missing, has another shape, or the file ends inside it.
    pub fn quantised(&mut self, name: &str, shape: &[usize]) -> HostResult<QTensor> {
        let refuse = |reason: String| HostError::Tensor { name: name.into(), reason };
        let info = self.content.tensor_infos.get(name).ok_or_else(|| refuse("missing".into()))?;
        if info.shape.dims() != shape {
            return Err(refuse(format!("shape {:?}, the metadata ask for {shape:?}", info.shape.dims())));
        }
        self.content.tensor(&mut self.file, name, &Device::Cpu).map_err(|error| refuse(error.to_string()))
    }

    /// A tensor as f32.
    ///
    /// # Errors
    /// As [`Gguf::quantised`].
    pub fn dense(&mut self, name: &str, shape: &[usize]) -> HostResult<Tensor> {
        Ok(self.quantised(name, shape)?.dequantize(&Device::Cpu)?)
    }
}

fn wrong_type(field: &str, value: &Value, expected: &str) -> HostError {
    let text: String = format!("{value:?}").chars().take(60).collect();
    HostError::field(field, text, expected)
}
