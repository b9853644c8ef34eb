//! JSON values as Python objects: dicts of metrics, metadata and report rows.

use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use serde_json::Value;

/// None, bool, int, float, str, list or dict.
pub fn to_py<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    match value {
        Value::Null => Ok(py.None().into_bound(py)),
        Value::Bool(x) => x.into_bound_py_any(py),
        Value::Number(x) => match (x.as_u64(), x.as_i64()) {
            (Some(x), _) => x.into_bound_py_any(py),
            (None, Some(x)) => x.into_bound_py_any(py),
            (None, None) => x.as_f64().into_bound_py_any(py),
        },
        Value::String(x) => x.into_bound_py_any(py),
        Value::Array(items) => {
            let list = PyList::empty(py);
            items.iter().try_for_each(|item| list.append(to_py(py, item)?))?;
            Ok(list.into_any())
        }
        Value::Object(fields) => {
            let dict = PyDict::new(py);
            fields.iter().try_for_each(|(name, field)| dict.set_item(name, to_py(py, field)?))?;
            Ok(dict.into_any())
        }
    }
}
