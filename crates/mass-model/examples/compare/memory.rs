//! Peak resident size of training steps.

use std::error::Error;
use std::process::Command;

use crate::peer::Peer;
use crate::train;

const STEPS: usize = 8;

/// Both sides, each task in fresh processes.
pub(crate) fn run(threads: usize) -> Result<(), Box<dyn Error>> {
    println!(
        "| training step | peak MiB | eager PyTorch peak MiB | PyTorch before the first step |\n|---|---|---|---|"
    );
    let tasks = [
        ("step", train::transformer()?.0),
        ("bert", train::bert()?.0),
    ];
    for (name, task) in tasks {
        let output = Command::new(std::env::current_exe()?)
            .args(["own-memory", name])
            .output()?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
        }
        let own: f64 = String::from_utf8(output.stdout)?.trim().parse()?;
        let theirs = match Peer::start(threads)? {
            Some(mut peer) => {
                let empty = peer.memory()?;
                // Compilers would add their own memory to the step's.
                peer.build_eager(&task)?;
                for _ in 0..STEPS {
                    peer.go("eager")?;
                }
                Some((peer.memory()?, empty))
            }
            None => None,
        };
        let show = |x: Option<f64>| x.map_or("-".to_owned(), |x| format!("{x:.0}"));
        let (peak, empty) = (theirs.map(|t| t.0), theirs.map(|t| t.1));
        println!("| {name} | {own:.0} | {} | {} |", show(peak), show(empty));
    }
    Ok(())
}

/// Steps of one task in this process; prints its peak in MiB.
pub(crate) fn own(task: &str) -> Result<(), Box<dyn Error>> {
    let steps = |step: &mut dyn FnMut()| (0..STEPS).for_each(|_| step());
    match task {
        "step" => steps(&mut train::transformer()?.1),
        "bert" => steps(&mut train::bert()?.1),
        other => return Err(format!("no task {other:?}").into()),
    }
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kib: f64 = line
        .and_then(|l| l.trim().strip_suffix(" kB"))
        .ok_or("the system does not tell the peak resident size")?
        .trim()
        .parse()?;
    println!("{:.1}", kib / 1024.0);
    Ok(())
}
