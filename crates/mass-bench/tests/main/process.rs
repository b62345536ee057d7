//! Programs that are interrupted on their way.

use std::process::Child;
use std::time::{Duration, Instant};

/// Waits for something that a program does on its way.
pub(crate) fn wait_for(child: &mut Child, reached: impl Fn() -> bool) {
    let started = Instant::now();
    while !reached() {
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        assert!(started.elapsed() < Duration::from_secs(60), "it never came");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Kills a program (-9) as soon as it is there.
pub(crate) fn killed_when(mut child: Child, reached: impl Fn() -> bool) {
    wait_for(&mut child, reached);
    child.kill().unwrap();
    child.wait().unwrap();
}
