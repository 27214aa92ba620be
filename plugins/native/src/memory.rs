//! The allocator of this library; Python and other libraries keep theirs.
//!
//! With jemalloc a forwarded request of 600 B costs 7 to 9 % less CPU than with glibc's allocator, at the same memory.
//! glibc takes its slow way for the tasks of tokio, which are aligned to 128 bytes.

use tikv_jemallocator::Jemalloc;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// What is free goes back to the system after a second, and not after ten: a gateway that has passed 600 KB messages on
/// keeps 10 to 17 MB less. At once would cost 2.6 times the CPU of such messages.
// SAFETY: jemalloc reads a variable of this name, a C string, when it starts. It has the type `const char *`.
#[unsafe(export_name = "_rjem_malloc_conf")]
static CONFIGURATION: Text = Text(c"dirty_decay_ms:1000,muzzy_decay_ms:0".as_ptr());

#[repr(transparent)]
struct Text(*const std::ffi::c_char);

// SAFETY: it leads to a constant.
unsafe impl Sync for Text {}
