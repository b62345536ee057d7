//! A PyTorch process that makes one step whenever it is asked to, so that both sides can take turns.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The process, and the version of PyTorch in it.
pub(crate) struct Peer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Of PyTorch.
    pub(crate) version: String,
    /// Built, and ready to take turns.
    pub(crate) variants: Vec<String>,
    /// Mean number of experts a token.
    pub(crate) active: f64,
}

impl Peer {
    /// The peer that `MASS_PEER_PYTHON` names a Python for, if it does.
    pub(crate) fn start(threads: usize) -> Result<Option<Self>, Box<dyn Error>> {
        let Some(python) = std::env::var_os("MASS_PEER_PYTHON") else {
            return Ok(None);
        };
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peer.py");
        let mut child = Command::new(python)
            .arg(script)
            .arg(threads.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().ok_or("the peer has no input")?;
        let output = BufReader::new(child.stdout.take().ok_or("the peer has no output")?);
        let mut peer = Self {
            child,
            input,
            output,
            version: String::new(),
            variants: Vec::new(),
            active: 0.0,
        };
        peer.version = peer.line()?;
        Ok(Some(peer))
    }

    /// Builds every variant of a task; says on standard error which does not run here, and why.
    pub(crate) fn build(&mut self, task: &str) -> Result<(), Box<dyn Error>> {
        for variant in self.begin(task)? {
            if let Err(reason) = self.build_variant(&variant)? {
                eprintln!("not run: {variant}: {reason}");
            }
        }
        if self.variants.is_empty() {
            return Err("nothing of the peer runs".into());
        }
        Ok(())
    }

    /// Builds a task's eager variant alone.
    pub(crate) fn build_eager(&mut self, task: &str) -> Result<(), Box<dyn Error>> {
        self.begin(task)?;
        Ok(self.build_variant("eager")??)
    }

    /// Forgets what is built; gives the variants that the task has.
    fn begin(&mut self, task: &str) -> Result<Vec<String>, Box<dyn Error>> {
        self.variants.clear();
        writeln!(self.input, "{task}")?;
        let names = self.line()?;
        Ok(names.split_whitespace().map(str::to_owned).collect())
    }

    /// The inner error is the reason why the variant does not run.
    fn build_variant(&mut self, variant: &str) -> Result<Result<(), String>, Box<dyn Error>> {
        writeln!(self.input, "build {variant}")?;
        let line = self.line()?;
        match line.split_once(' ') {
            Some(("ready", active)) => {
                self.active = active.parse()?;
                self.variants.push(variant.to_owned());
                Ok(Ok(()))
            }
            Some(("missing", reason)) => Ok(Err(reason.to_owned())),
            _ => Err(format!("the peer answered {line:?}").into()),
        }
    }

    /// Seconds of one step of a variant.
    pub(crate) fn go(&mut self, variant: &str) -> Result<f64, Box<dyn Error>> {
        writeln!(self.input, "go {variant}")?;
        Ok(self.line()?.parse()?)
    }

    /// Peak resident size so far, MiB.
    pub(crate) fn memory(&mut self) -> Result<f64, Box<dyn Error>> {
        writeln!(self.input, "memory")?;
        Ok(self.line()?.parse::<f64>()? / 1024.0)
    }

    fn line(&mut self) -> Result<String, Box<dyn Error>> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            return Err(format!("the peer ended: {}", self.child.wait()?).into());
        }
        Ok(line.trim().to_owned())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
