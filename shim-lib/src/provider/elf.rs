//! Loaded libraries as the dynamic linker sees them: which one an address is in, and where a library keeps the address
//! of a function it imports. Changes one pointer of one library; never code.
#![expect(unsafe_code, reason = "reads the dynamic section of loaded libraries")]

use std::ffi::{CStr, c_char, c_int, c_void};

use libc::{Elf64_Addr, Elf64_Phdr, Elf64_Sym, dl_phdr_info};

const DT_STRTAB: i64 = 5;
const DT_SYMTAB: i64 = 6;
const DT_RELA: i64 = 7;
const DT_RELASZ: i64 = 8;
const DT_PLTRELSZ: i64 = 2;
const DT_JMPREL: i64 = 23;

#[cfg(target_arch = "x86_64")]
const SLOT_KINDS: [u32; 2] = [6, 7];
#[cfg(target_arch = "aarch64")]
const SLOT_KINDS: [u32; 2] = [1025, 1026];

#[repr(C)]
struct Dyn {
    tag: i64,
    value: u64,
}

#[repr(C)]
struct Rela {
    offset: u64,
    info: u64,
    addend: i64,
}

/// Path of the loaded file this address is in.
pub fn file_of(address: usize) -> Option<String> {
    // SAFETY: plain data; dladdr only fills it.
    unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        if libc::dladdr(address as *const c_void, &raw mut info) == 0 || info.dli_fname.is_null() {
            return None;
        }
        Some(CStr::from_ptr(info.dli_fname).to_string_lossy().into_owned())
    }
}

struct Search<'a> {
    library: &'a str,
    names: &'a [&'a CStr],
    found: Vec<(usize, *mut *mut c_void)>,
}

/// Where the first library whose path contains `library` keeps the addresses of the functions in `names`; the numbers
/// are places in `names`.
pub fn slots(library: &str, names: &[&CStr]) -> Vec<(usize, *mut *mut c_void)> {
    let mut search = Search { library, names, found: Vec::new() };
    // SAFETY: the callback gets the pointer passed here, during this call only.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut search).cast()) };
    search.found
}

unsafe extern "C" fn visit(info: *mut dl_phdr_info, _size: usize, data: *mut c_void) -> c_int {
    // SAFETY: the linker describes a loaded library, which stays loaded during the walk; `data` is slots' search.
    unsafe {
        let search = &mut *data.cast::<Search<'_>>();
        let name: *const c_char = (*info).dlpi_name;
        if name.is_null() || !CStr::from_ptr(name).to_string_lossy().contains(search.library) {
            return 0;
        }
        let base = (*info).dlpi_addr;
        let headers: &[Elf64_Phdr] = std::slice::from_raw_parts((*info).dlpi_phdr, usize::from((*info).dlpi_phnum));
        if let Some(dynamic) = headers.iter().find(|h| h.p_type == libc::PT_DYNAMIC) {
            search.look((base + dynamic.p_vaddr) as *const Dyn, base);
        }
        1
    }
}

impl Search<'_> {
    /// # Safety
    /// `dynamic` is the dynamic section of a library loaded at `base`.
    unsafe fn look(&mut self, mut dynamic: *const Dyn, base: Elf64_Addr) {
        let (mut strings, mut symbols, mut rela, mut rela_size, mut plt, mut plt_size) = (0, 0, 0, 0, 0, 0);
        // SAFETY: the section ends in a null tag; glibc has relocated its addresses.
        unsafe {
            while (*dynamic).tag != 0 {
                match (*dynamic).tag {
                    DT_STRTAB => strings = (*dynamic).value,
                    DT_SYMTAB => symbols = (*dynamic).value,
                    DT_RELA => rela = (*dynamic).value,
                    DT_RELASZ => rela_size = (*dynamic).value,
                    DT_JMPREL => plt = (*dynamic).value,
                    DT_PLTRELSZ => plt_size = (*dynamic).value,
                    _ => {}
                }
                dynamic = dynamic.add(1);
            }
        }
        if strings == 0 || symbols == 0 {
            return;
        }
        for (table, size) in [(plt, plt_size), (rela, rela_size)] {
            if table == 0 {
                continue;
            }
            // SAFETY: tables of the sizes the section gives.
            unsafe {
                let entries = std::slice::from_raw_parts(table as *const Rela, size as usize / size_of::<Rela>());
                for entry in entries.iter().filter(|e| SLOT_KINDS.contains(&(e.info as u32))) {
                    let symbol = &*(symbols as *const Elf64_Sym).add((entry.info >> 32) as usize);
                    let name = CStr::from_ptr((strings + u64::from(symbol.st_name)) as *const c_char);
                    if let Some(which) = self.names.iter().position(|n| *n == name) {
                        self.found.push((which, (base + entry.offset) as *mut *mut c_void));
                    }
                }
            }
        }
    }
}

/// Writes a slot whose page may be read-only, and makes it read-only again if it was.
///
/// # Safety
/// `slot` is one [`slots`] found, `value` a function of the same signature as what it held.
pub unsafe fn write_slot(slot: *mut *mut c_void, value: *mut c_void) -> bool {
    // SAFETY: sysconf has no preconditions; the page holds the slot.
    unsafe {
        let page = libc::sysconf(libc::_SC_PAGESIZE) as usize;
        let start = (slot as usize & !(page - 1)) as *mut c_void;
        let read_only = is_read_only(slot as usize);
        if read_only && libc::mprotect(start, page, libc::PROT_READ | libc::PROT_WRITE) != 0 {
            return false;
        }
        (*slot.cast::<std::sync::atomic::AtomicPtr<c_void>>()).store(value, std::sync::atomic::Ordering::Release);
        if read_only {
            libc::mprotect(start, page, libc::PROT_READ);
        }
        true
    }
}

/// Whether the mapping at this address cannot be written; also true if that cannot be found out.
fn is_read_only(address: usize) -> bool {
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return true };
    maps.lines()
        .find_map(|line| {
            let (range, rest) = line.split_once(' ')?;
            let (start, end) = range.split_once('-')?;
            let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
            (start..end).contains(&address).then(|| rest.as_bytes().get(1) != Some(&b'w'))
        })
        .unwrap_or(true)
}
