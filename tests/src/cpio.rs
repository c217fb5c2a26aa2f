//! Writes cpio archives in the "newc" form, the one that a Linux kernel unpacks as its initramfs.
//!
//! The kernel takes several archives one behind the other in one file, as long as each starts at a multiple of four
//! bytes; that is how a test script joins a ready-made initramfs. Entries belong to root, times are zero and inode
//! numbers count up, so the same tree always gives the same bytes.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_FILE: u32 = 0o100_000;
const TYPE_LINK: u32 = 0o120_000;
const END: &str = "TRAILER!!!";

/// An archive being written to `W`.
#[derive(Debug)]
pub struct Archive<W: Write> {
    to: W,
    written: u64,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// Starts an archive behind `already` bytes that `to` holds: pads to where the kernel looks for the next one.
    ///
    /// # Errors
    /// What `to` reports.
    pub fn after(to: W, already: u64) -> io::Result<Self> {
        let mut archive = Self { to, written: already, inode: 0 };
        archive.pad()?;
        Ok(archive)
    }

    /// Adds a folder; its parents have to be added before it.
    ///
    /// # Errors
    /// What the output reports.
    pub fn directory(&mut self, name: &str, permissions: u32) -> io::Result<()> {
        self.entry(name.as_bytes(), TYPE_DIRECTORY | permissions, &[])
    }

    /// Adds a file with its whole contents.
    ///
    /// # Errors
    /// What the output reports, or [`io::ErrorKind::FileTooLarge`] from 4 GiB on.
    pub fn file(&mut self, name: &str, permissions: u32, data: &[u8]) -> io::Result<()> {
        self.entry(name.as_bytes(), TYPE_FILE | permissions, data)
    }

    /// Adds everything below `root`, sorted by name.
    ///
    /// # Errors
    /// What reading the tree or the output reports; a file that is neither folder, file nor link is
    /// [`io::ErrorKind::Unsupported`].
    pub fn tree(&mut self, root: &Path) -> io::Result<()> {
        self.below(root, &mut Vec::new())
    }

    fn below(&mut self, folder: &Path, prefix: &mut Vec<u8>) -> io::Result<()> {
        let mut entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let kept = prefix.len();
            prefix.extend_from_slice(entry.file_name().as_bytes());
            let path = entry.path();
            let about = entry.metadata()?;
            let permissions = about.permissions().mode() & 0o7777;
            if about.is_dir() {
                self.entry(prefix, TYPE_DIRECTORY | permissions, &[])?;
                prefix.push(b'/');
                self.below(&path, prefix)?;
            } else if about.is_symlink() {
                let target = fs::read_link(&path)?;
                self.entry(prefix, TYPE_LINK | 0o777, OsStr::as_bytes(target.as_os_str()))?;
            } else if about.is_file() {
                self.entry(prefix, TYPE_FILE | permissions, &fs::read(&path)?)?;
            } else {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!("{}: special file", path.display()),
                ));
            }
            prefix.truncate(kept);
        }
        Ok(())
    }

    /// Ends the archive and gives the output back.
    ///
    /// # Errors
    /// What the output reports.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.entry(END.as_bytes(), 0, &[])?;
        self.to.flush()?;
        Ok(self.to)
    }

    fn entry(&mut self, name: &[u8], mode: u32, data: &[u8]) -> io::Result<()> {
        let size = u32::try_from(data.len()).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        let name_size =
            u32::try_from(name.len() + 1).map_err(|_| io::Error::from(io::ErrorKind::InvalidFilename))?;
        self.inode += 1;
        // inode, mode, uid, gid, links, mtime, size, device (2), rdev (2), length of the name, checksum (unused)
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.put(header.as_bytes())?;
        self.put(name)?;
        self.put(&[0])?;
        self.pad()?;
        self.put(data)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn pad(&mut self) -> io::Result<()> {
        let short = (4 - self.written % 4) % 4;
        self.put(&[0; 3][..short as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_made_of_aligned_entries_and_a_trailer() {
        let mut archive = Archive::after(Vec::new(), 5).expect("memory");
        archive.directory("d", 0o755).expect("memory");
        archive.file("d/f", 0o644, b"hello").expect("memory");
        let bytes = archive.finish().expect("memory");
        // Three bytes bring an offset of 5 to 8; what follows is a header.
        assert_eq!(&bytes[..9], b"\0\0\x00070701");
        assert_eq!((bytes.len() + 5) % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("d/f\0"));
        assert!(text.contains("hello\0\0\x00070701"));
        assert!(text.contains("TRAILER!!!\0"));
    }
}
