//! The device and launches: with `buffer.rs` the only file with `unsafe` code.
//!
//! # Safety, in general
//! Every call goes to the driver with a context, stream, module or pointer that this file got from it and that lives
//! as long as [`Inner`], which every buffer holds. Work is ordered by the one stream, so memory is freed only after
//! the kernels that were given it. A kernel reaches device memory alone: whatever it does there, nothing of the
//! host's is touched.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use crate::buffer::{Value, View, ViewMut};
use crate::error::CudaError;
use crate::ptx;

/// The oldest driver interface that reads our PTX (version 8.2).
const OLDEST_DRIVER: u32 = 12_020;

/// What is looked up in the driver's library: a lookup that fails later would panic.
const SYMBOLS: [&[u8]; 28] = [
    b"cuInit\0",
    b"cuDriverGetVersion\0",
    b"cuDeviceGetCount\0",
    b"cuDeviceGet\0",
    b"cuDeviceGetName\0",
    b"cuDeviceTotalMem_v2\0",
    b"cuDeviceGetAttribute\0",
    b"cuDevicePrimaryCtxRetain\0",
    b"cuDevicePrimaryCtxRelease_v2\0",
    b"cuCtxSetCurrent\0",
    b"cuStreamCreate\0",
    b"cuStreamDestroy_v2\0",
    b"cuStreamSynchronize\0",
    b"cuMemGetInfo_v2\0",
    b"cuMemAllocAsync\0",
    b"cuMemFreeAsync\0",
    b"cuMemcpyHtoDAsync_v2\0",
    b"cuMemcpyDtoHAsync_v2\0",
    b"cuMemcpyDtoDAsync_v2\0",
    b"cuMemsetD8Async\0",
    b"cuModuleLoadData\0",
    b"cuModuleUnload\0",
    b"cuModuleGetFunction\0",
    b"cuLaunchKernel\0",
    b"cuGetErrorString\0",
    b"cuGetErrorName\0",
    b"cuDeviceGetDefaultMemPool\0",
    b"cuMemPoolSetAttribute\0",
];

/// A CUDA device with its one stream of work. Clones are the same device.
///
/// ```no_run
/// use mass_cuda::{Buffer, CudaError, Device, kernels};
///
/// # fn main() -> Result<(), CudaError> {
/// let device = Device::open(0)?;
/// println!("{} with {} bytes", device.name(), device.memory()?.total);
/// let mut x = Buffer::from_slice(&device, &[1.0_f32, 2.0, 3.0])?;
/// kernels::elementwise::scale(&device, 2.0, x.view_mut())?;
/// assert_eq!(x.to_vec()?, [2.0, 4.0, 6.0]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Device(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    device: sys::CUdevice,
    pub(crate) context: sys::CUcontext,
    pub(crate) stream: sys::CUstream,
    module: sys::CUmodule,
    functions: HashMap<String, Function>,
    name: String,
    ordinal: usize,
    capability: (u32, u32),
    multiprocessors: usize,
    failed: AtomicBool,
    failure: Mutex<Option<CudaError>>,
}

struct Function {
    handle: sys::CUfunction,
    parameters: Vec<usize>,
}

// SAFETY: the driver's handles may be used from any thread; every call makes the context current first.
unsafe impl Send for Inner {}
// SAFETY: as above; what changes after opening is atomic or behind a lock.
unsafe impl Sync for Inner {}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Device({}, {:?})", self.0.ordinal, self.0.name)
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Bytes of a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Not in use by anybody.
    pub free: usize,
    /// All there are.
    pub total: usize,
}

/// The driver's words for an error.
fn call(what: &str, error: DriverError) -> CudaError {
    let message = match error.error_string() {
        Ok(text) => text.to_string_lossy().into_owned(),
        Err(_) => "unknown error".into(),
    };
    CudaError::Call {
        what: what.into(),
        code: error.0 as u32,
        message,
    }
}

/// Whether there is a driver, without loading anything else or calling it.
fn find_driver() -> Result<(), CudaError> {
    let none = |missing: String| Err(CudaError::NoDriver { missing });
    // SAFETY: opens the driver's library, which has no requirements on whoever opens it.
    if !unsafe { sys::is_culib_present() } {
        return none(String::new());
    }
    // SAFETY: it is present, so this does not panic; the symbols' addresses are looked up and not used.
    let lacks = SYMBOLS
        .iter()
        .find(|name| unsafe { sys::culib().get::<unsafe extern "C" fn()>(**name).is_err() });
    match lacks {
        None => Ok(()),
        Some(name) => none(format!(
            "; what there is lacks {}",
            String::from_utf8_lossy(name).trim_end_matches('\0')
        )),
    }
}

impl Device {
    /// Number of devices that the driver knows.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::DriverTooOld`], or [`CudaError::Call`] if the driver does not start.
    pub fn count() -> Result<usize, CudaError> {
        find_driver()?;
        match result::init() {
            Ok(()) => {}
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(0),
            Err(e) => return Err(call("starting the driver", e)),
        }
        let mut version = 0;
        // SAFETY: the pointer is to a number of ours.
        unsafe { sys::cuDriverGetVersion(&mut version) }
            .result()
            .map_err(|e| call("asking for the driver's version", e))?;
        let found = u32::try_from(version).unwrap_or(0);
        if found < OLDEST_DRIVER {
            let wanted = OLDEST_DRIVER;
            return Err(CudaError::DriverTooOld { found, wanted });
        }
        match result::device::get_count() {
            Ok(count) => Ok(usize::try_from(count).unwrap_or(0)),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(0),
            Err(e) => Err(call("counting devices", e)),
        }
    }

    /// Opens a device and loads the kernels.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`] or [`CudaError::DriverTooOld`], [`CudaError::NoDevice`] or
    /// [`CudaError::DeviceTooOld`], [`CudaError::Call`] for whatever else the driver refuses, such as the kernels.
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        Self::open_with(ordinal, ptx::PTX)
    }

    /// [`open`](Self::open) with another module than the embedded one.
    pub(crate) fn open_with(ordinal: usize, ptx: &str) -> Result<Self, CudaError> {
        let count = Self::count()?;
        let none = CudaError::NoDevice { ordinal, count };
        if ordinal >= count {
            return Err(none);
        }
        let device = result::device::get(i32::try_from(ordinal).map_err(|_| none)?)
            .map_err(|e| call("finding the device", e))?;
        let name = result::device::get_name(device).map_err(|e| call("asking for its name", e))?;
        let attribute = |which| {
            // SAFETY: the device came from the driver.
            let value = unsafe { result::device::get_attribute(device, which) };
            value
                .map(|v| u32::try_from(v).unwrap_or(0))
                .map_err(|e| call("asking what the device can do", e))
        };
        use sys::CUdevice_attribute as A;
        let capability = (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let pools = attribute(A::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)?;
        if capability < (7, 5) || pools == 0 {
            return Err(CudaError::DeviceTooOld { name, capability });
        }
        let multiprocessors =
            attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1) as usize;
        // SAFETY: the device came from the driver; the context is released when `inner` is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }
            .map_err(|e| call("opening the device", e))?;
        let mut inner = Inner {
            device,
            context,
            stream: std::ptr::null_mut(),
            module: std::ptr::null_mut(),
            functions: HashMap::new(),
            name,
            ordinal,
            capability,
            multiprocessors,
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
        };
        inner.enter()?;
        inner.stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(|e| call("making a stream", e))?;
        inner.keep_memory();
        inner.load(ptx)?;
        Ok(Self(Arc::new(inner)))
    }

    /// Its name, such as `NVIDIA H100 80GB HBM3`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its number among the devices.
    pub fn ordinal(&self) -> usize {
        self.0.ordinal
    }

    /// Its compute capability, such as (9, 0).
    pub fn compute_capability(&self) -> (u32, u32) {
        self.0.capability
    }

    /// Number of its multiprocessors.
    pub fn multiprocessors(&self) -> usize {
        self.0.multiprocessors
    }

    /// Free and total bytes.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn memory(&self) -> Result<Memory, CudaError> {
        self.0.enter()?;
        self.0.memory()
    }

    /// Waits until all work given to it is done.
    ///
    /// # Errors
    /// [`CudaError::Call`] if some of it failed.
    pub fn synchronise(&self) -> Result<(), CudaError> {
        self.0.enter()?;
        // SAFETY: see the file's head.
        let done = unsafe { result::stream::synchronize(self.0.stream) };
        done.map_err(|e| self.0.broken("waiting for the device", e))
    }

    /// Launches a kernel of the module. What it is given must be what the kernel's parameters are: their number and
    /// bytes are checked, lengths are the caller's concern.
    pub(crate) fn launch(
        &self,
        kernel: &str,
        grid: (u32, u32),
        block: u32,
        arguments: &Arguments,
    ) -> Result<(), CudaError> {
        let inner = &*self.0;
        inner.enter()?;
        let unknown = || CudaError::Call {
            what: format!("finding the kernel {kernel}"),
            code: 500,
            message: "the module has no kernel of this name and these parameters".into(),
        };
        let function = inner.functions.get(kernel).ok_or_else(unknown)?;
        if arguments.sizes() != function.parameters {
            return Err(unknown());
        }
        // Functions check what they are given, by name. What one forgot must not reach another device's stream.
        if arguments.places.iter().any(|a| !a.lies_on(self)) {
            return Err(CudaError::OtherDevice {
                what: "an argument of a kernel",
            });
        }
        let mut pointers = arguments.pointers();
        // SAFETY: as many arguments as the kernel has parameters, each of the parameter's bytes; see the file's head
        // for the rest.
        let launched = unsafe {
            result::launch_kernel(
                function.handle,
                (grid.0, grid.1, 1),
                (block, 1, 1),
                0,
                inner.stream,
                &mut pointers,
            )
        };
        launched.map_err(|e| inner.broken(&format!("launching {kernel}"), e))
    }
}

impl Inner {
    /// Makes the context current; refuses after a failure.
    pub(crate) fn enter(&self) -> Result<(), CudaError> {
        if self.failed.load(Ordering::Acquire) {
            let failure = self.failure.lock().unwrap_or_else(|e| e.into_inner());
            if let Some(error) = &*failure {
                return Err(error.clone());
            }
        }
        // SAFETY: the context is retained as long as `self` lives.
        unsafe { result::ctx::set_current(self.context) }
            .map_err(|e| self.broken("using the device", e))
    }

    /// An error after which nothing on the device is to be relied on.
    pub(crate) fn broken(&self, what: &str, error: DriverError) -> CudaError {
        let error = call(what, error);
        let mut failure = self.failure.lock().unwrap_or_else(|e| e.into_inner());
        let first = failure.get_or_insert(error).clone();
        self.failed.store(true, Ordering::Release);
        first
    }

    fn memory(&self) -> Result<Memory, CudaError> {
        let (free, total) =
            result::mem_get_info().map_err(|e| self.broken("asking for free memory", e))?;
        Ok(Memory { free, total })
    }

    /// Lets the driver keep what is freed for the next allocation. A driver that will not only makes us slower.
    fn keep_memory(&self) {
        let mut most = u64::MAX;
        // SAFETY: the device came from the driver, and the attribute is a number of 64 bits.
        unsafe {
            if let Ok(pool) = result::device::get_default_mem_pool(self.device) {
                let which = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
                let _ = sys::cuMemPoolSetAttribute(pool, which, (&raw mut most).cast::<c_void>());
            }
        }
    }

    fn load(&mut self, text: &str) -> Result<(), CudaError> {
        let what = "loading the kernels";
        let invalid = || CudaError::Call {
            what: what.into(),
            code: 218,
            message: "the module is no text".into(),
        };
        let image = CString::new(text).map_err(|_| invalid())?;
        // SAFETY: the image ends with a zero and outlives the call.
        self.module = unsafe { result::module::load_data(image.as_ptr().cast()) }
            .map_err(|e| call(what, e))?;
        for entry in ptx::entries(text) {
            let name = CString::new(entry.name.as_str()).map_err(|_| invalid())?;
            // SAFETY: the module was just loaded.
            let handle = unsafe { result::module::get_function(self.module, name) }
                .map_err(|e| call(what, e))?;
            let parameters = entry.parameters;
            self.functions
                .insert(entry.name, Function { handle, parameters });
        }
        Ok(())
    }

    pub(crate) fn allocate(&self, bytes: usize) -> Result<sys::CUdeviceptr, CudaError> {
        self.enter()?;
        // SAFETY: see the file's head.
        match unsafe { result::malloc_async(self.stream, bytes) } {
            Ok(pointer) => Ok(pointer),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let Memory { free, total } = self.memory()?;
                Err(CudaError::OutOfMemory {
                    wanted: bytes,
                    free,
                    total,
                })
            }
            Err(e) => Err(self.broken("allocating memory", e)),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: nobody else holds these: buffers hold the device. Errors have been told or come too late to matter.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            if !self.stream.is_null() {
                let _ = result::stream::synchronize(self.stream);
            }
            if !self.module.is_null() {
                let _ = result::module::unload(self.module);
            }
            if !self.stream.is_null() {
                let _ = result::stream::destroy(self.stream);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// The arguments of a launch.
#[derive(Debug, Default)]
pub(crate) struct Arguments {
    /// Each begins at a new word.
    words: Vec<u64>,
    places: Vec<Argument>,
}

#[derive(Debug)]
struct Argument {
    first_word: usize,
    bytes: usize,
    /// Of an address: which device's, by where that is kept.
    device: Option<*const Inner>,
}

impl Argument {
    fn lies_on(&self, device: &Device) -> bool {
        self.device.is_none_or(|own| own == Arc::as_ptr(&device.0))
    }
}

impl Arguments {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    fn word(self, word: u64, bytes: usize) -> Self {
        self.word_of(word, bytes, None)
    }

    fn word_of(mut self, word: u64, bytes: usize, device: Option<&Device>) -> Self {
        self.places.push(Argument {
            first_word: self.words.len(),
            bytes,
            device: device.map(|d| Arc::as_ptr(&d.0)),
        });
        self.words.push(word);
        self
    }

    /// The address of values that are read.
    pub(crate) fn view<T: Value>(self, view: View<'_, T>) -> Self {
        self.word_of(view.address(), 8, Some(view.device()))
    }

    /// The same, or null.
    pub(crate) fn view_or_null<T: Value>(self, view: Option<View<'_, T>>) -> Self {
        match view {
            Some(view) => self.view(view),
            None => self.word(0, 8),
        }
    }

    /// The address of values that are written.
    pub(crate) fn view_mut<T: Value>(self, view: &ViewMut<'_, T>) -> Self {
        self.word_of(view.address(), 8, Some(view.device()))
    }

    /// The same, or null.
    pub(crate) fn view_mut_or_null<T: Value>(self, view: Option<&ViewMut<'_, T>>) -> Self {
        match view {
            Some(view) => self.view_mut(view),
            None => self.word(0, 8),
        }
    }

    /// A key of 64 bits.
    pub(crate) fn wide(self, value: u64) -> Self {
        self.word(value, 8)
    }

    /// A number of 64 bits.
    pub(crate) fn long(self, value: usize) -> Self {
        self.word(value as u64, 8)
    }

    /// A number of 32 bits.
    pub(crate) fn int(self, value: u32) -> Self {
        self.word(value.into(), 4)
    }

    /// A floating-point number.
    pub(crate) fn float(self, value: f32) -> Self {
        self.word(value.to_bits().into(), 4)
    }

    /// A structure, word by word.
    pub(crate) fn structure(mut self, words: &[u32]) -> Self {
        self.places.push(Argument {
            first_word: self.words.len(),
            bytes: 4 * words.len(),
            device: None,
        });
        for pair in words.chunks(2) {
            let high = pair.get(1).copied().unwrap_or(0);
            self.words.push(u64::from(high) << 32 | u64::from(pair[0]));
        }
        self
    }

    fn sizes(&self) -> Vec<usize> {
        self.places.iter().map(|a| a.bytes).collect()
    }

    /// Where each argument is, for the driver, which only reads there.
    fn pointers(&self) -> Vec<*mut c_void> {
        let pointer = |a: &Argument| (&raw const self.words[a.first_word]).cast_mut().cast();
        self.places.iter().map(pointer).collect()
    }
}
