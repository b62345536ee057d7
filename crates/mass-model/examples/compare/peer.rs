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
        };
        peer.version = peer.line()?;
        Ok(Some(peer))
    }

    /// Builds a task.
    pub(crate) fn build(&mut self, task: &str) -> Result<(), Box<dyn Error>> {
        writeln!(self.input, "{task}")?;
        match self.line()?.as_str() {
            "ready" => Ok(()),
            other => Err(format!("the peer answered {other:?}").into()),
        }
    }

    /// One step: its seconds, and the mean number of experts a token.
    pub(crate) fn go(&mut self) -> Result<(f64, f64), Box<dyn Error>> {
        writeln!(self.input, "go")?;
        let line = self.line()?;
        let (seconds, active) = line.split_once(' ').ok_or("the peer's answer is short")?;
        Ok((seconds.parse()?, active.parse()?))
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
