//! A file system in memory whose power can be cut between any two calls, and whose disk can be full.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Result};
use std::path::{Component, Path};

use super::super::storage::Storage;

type Id = usize;
const ROOT: Id = 0;

#[derive(Clone, Debug)]
enum Node {
    Directory(BTreeMap<String, Id>),
    File(Vec<u8>),
}

/// A change of names in a directory that a power cut may undo, whatever becomes of those before and after it.
#[derive(Clone, Debug)]
struct Change {
    directory: Id,
    removed: Option<String>,
    added: Option<(String, Id)>,
}

/// What goes wrong, by the number of the call that changes something, counted from 0.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Faults {
    /// From this call on none does anything: the power is off.
    pub(super) power_cut: Option<usize>,
    /// This call fails, and with `stays_full` all later ones that need room too.
    pub(super) no_space: Option<usize>,
    pub(super) stays_full: bool,
    /// This call, a sync, does nothing and says that it did.
    pub(super) false_sync: Option<usize>,
}

#[derive(Clone, Debug)]
pub(super) struct Simulated {
    /// As processes see it.
    nodes: RefCell<Vec<Node>>,
    /// As the disk has it.
    disk: RefCell<Vec<Node>>,
    pending: RefCell<Vec<Change>>,
    calls: Cell<usize>,
    syncs: RefCell<Vec<usize>>,
    faults: Faults,
}

impl Simulated {
    pub(super) fn new(faults: Faults) -> Self {
        let root = vec![Node::Directory(BTreeMap::new())];
        Self {
            nodes: RefCell::new(root.clone()),
            disk: RefCell::new(root),
            pending: RefCell::default(),
            calls: Cell::new(0),
            syncs: RefCell::default(),
            faults,
        }
    }

    /// With other faults, its calls counted anew.
    pub(super) fn with(&self, faults: Faults) -> Self {
        let mut new = self.clone();
        new.calls = Cell::new(0);
        new.faults = faults;
        new
    }

    /// Calls that change something, so far.
    pub(super) fn calls(&self) -> usize {
        self.calls.get()
    }

    /// The numbers of those that were syncs.
    pub(super) fn syncs(&self) -> Vec<usize> {
        self.syncs.borrow().clone()
    }

    /// Everything that a machine may find after its power was cut now: of the changes of names that are not synced any part may
    /// have reached the disk, and of the files that are not synced either all or nothing.
    pub(super) fn after_a_power_cut(&self) -> Vec<Self> {
        let pending = self.pending.borrow();
        assert!(pending.len() < 16, "{} pending", pending.len());
        let mut found = Vec::new();
        for part in 0..1usize << pending.len() {
            for files_kept in [false, true] {
                let mut nodes = self.disk.borrow().clone();
                if files_kept {
                    for (node, seen) in nodes.iter_mut().zip(&*self.nodes.borrow()) {
                        if let Node::File(_) = seen {
                            *node = seen.clone();
                        }
                    }
                }
                for (_, change) in pending
                    .iter()
                    .enumerate()
                    .filter(|(i, _)| part >> i & 1 == 1)
                {
                    apply(&mut nodes, change);
                }
                let new = Self::new(Faults::default());
                *new.nodes.borrow_mut() = nodes.clone();
                *new.disk.borrow_mut() = nodes;
                found.push(new);
            }
        }
        found
    }

    fn find(&self, path: &Path) -> Result<Id> {
        let nodes = self.nodes.borrow();
        let mut at = ROOT;
        for part in path.components() {
            let Component::Normal(name) = part else {
                continue;
            };
            let Node::Directory(entries) = &nodes[at] else {
                return Err(ErrorKind::NotADirectory.into());
            };
            let name = name.to_str().expect("a name in Unicode");
            at = *entries.get(name).ok_or(ErrorKind::NotFound)?;
        }
        Ok(at)
    }

    fn place(&self, path: &Path) -> Result<(Id, String)> {
        let name = path.file_name().expect("a path with a name");
        let name = name.to_str().expect("a name in Unicode").to_owned();
        Ok((self.find(path.parent().expect("a parent"))?, name))
    }

    /// Counts a call that changes something; an error if it is one that fails.
    fn call(&self, needs_room: bool) -> Result<usize> {
        let number = self.calls.replace(self.calls.get() + 1);
        if self.faults.power_cut.is_some_and(|cut| number >= cut) {
            return Err(Error::other("the power is off"));
        }
        let full = match self.faults.no_space {
            Some(from) if self.faults.stays_full => number >= from && needs_room,
            Some(only) => number == only,
            None => false,
        };
        if full {
            return Err(ErrorKind::StorageFull.into());
        }
        Ok(number)
    }

    fn change(&self, directory: Id, removed: Option<String>, added: Option<(String, Id)>) {
        let change = Change {
            directory,
            removed,
            added,
        };
        apply(&mut self.nodes.borrow_mut(), &change);
        self.pending.borrow_mut().push(change);
    }

    fn add(&self, path: &Path, node: Node) -> Result<Id> {
        let (directory, name) = self.place(path)?;
        let id = self.nodes.borrow().len();
        let empty = match &node {
            Node::Directory(_) => node.clone(),
            Node::File(_) => Node::File(Vec::new()),
        };
        self.nodes.borrow_mut().push(node);
        self.disk.borrow_mut().push(empty);
        self.change(directory, None, Some((name, id)));
        Ok(id)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        self.find(path)?;
        let (directory, name) = self.place(path)?;
        self.change(directory, Some(name), None);
        Ok(())
    }

    fn is_false(&self, number: usize) -> bool {
        self.syncs.borrow_mut().push(number);
        self.faults.false_sync == Some(number)
    }
}

fn apply(nodes: &mut [Node], change: &Change) {
    let Node::Directory(entries) = &mut nodes[change.directory] else {
        panic!("names are in directories");
    };
    if let Some(name) = &change.removed {
        entries.remove(name);
    }
    if let Some((name, id)) = &change.added {
        entries.insert(name.clone(), *id);
    }
}

impl Storage for Simulated {
    type File = Id;

    fn is_dir(&self, path: &Path) -> bool {
        let found = self.find(path);
        found.is_ok_and(|id| matches!(self.nodes.borrow()[id], Node::Directory(_)))
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>> {
        match &self.nodes.borrow()[self.find(path)?] {
            Node::File(bytes) => Ok(bytes.clone()),
            Node::Directory(_) => Err(ErrorKind::IsADirectory.into()),
        }
    }

    fn names(&self, dir: &Path) -> Result<Vec<String>> {
        match &self.nodes.borrow()[self.find(dir)?] {
            Node::Directory(entries) => Ok(entries.keys().cloned().collect()),
            Node::File(_) => Err(ErrorKind::NotADirectory.into()),
        }
    }

    fn create_dir(&self, path: &Path) -> Result<()> {
        self.call(true)?;
        if self.find(path).is_ok() {
            return Err(ErrorKind::AlreadyExists.into());
        }
        self.add(path, Node::Directory(BTreeMap::new())).map(drop)
    }

    fn create(&self, path: &Path) -> Result<Id> {
        self.call(true)?;
        self.add(path, Node::File(Vec::new()))
    }

    fn write(&self, file: &mut Id, bytes: &[u8]) -> Result<()> {
        self.call(true)?;
        if let Node::File(content) = &mut self.nodes.borrow_mut()[*file] {
            content.extend(bytes);
        }
        Ok(())
    }

    fn sync(&self, file: &Id) -> Result<()> {
        let number = self.call(true)?;
        if !self.is_false(number) {
            self.disk.borrow_mut()[*file] = self.nodes.borrow()[*file].clone();
        }
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> Result<()> {
        let number = self.call(true)?;
        let directory = self.find(dir)?;
        if !self.is_false(number) {
            let mut pending = self.pending.borrow_mut();
            for change in pending.iter().filter(|c| c.directory == directory) {
                apply(&mut self.disk.borrow_mut(), change);
            }
            pending.retain(|c| c.directory != directory);
        }
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.call(true)?;
        let (directory, old) = self.place(from)?;
        let (other, new) = self.place(to)?;
        assert_eq!(directory, other, "renamed across directories");
        let id = self.find(from)?;
        self.change(directory, Some(old), Some((new, id)));
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> Result<()> {
        self.call(false)?;
        self.remove(path)
    }

    fn remove_dir_all(&self, path: &Path) -> Result<()> {
        self.call(false)?;
        self.remove(path)
    }
}
