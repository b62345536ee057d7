//! A training process killed at any moment leaves a checkpoint from which it ends where it would have ended.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mass_model::checkpoint::{self, Checkpoint, Snapshot};
use mass_model::growth::{Grower, Mixtures};
use mass_model::lm::LanguageModel;
use mass_model::optim::{AdamW, AdamWConfig, Ema};
use mass_model::seeded_rng;
use mass_routing::{Combine, RouterConfig};
use ndarray_rand::rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::growing::{advance, all_values, grower, model};

/// Tells this test binary to be the process that is killed: the directory to train in.
const DIRECTORY: &str = "MASS_MODEL_KILL_TEST_DIRECTORY";
const STEPS: u64 = 22;
const KILLS: u64 = 50;

/// What a run needs beside model and optimiser to go on.
#[derive(Serialize, Deserialize)]
struct State {
    grower: Grower,
    /// Draws the order of the data.
    order: ChaCha8Rng,
}

type Run = Checkpoint<LanguageModel, State>;

fn begin() -> Run {
    let router = RouterConfig::Noisy {
        std: 0.3,
        seed: 9,
        inner: Box::new(RouterConfig::TopP {
            p: 0.6,
            combine: Combine::Renormalised,
        }),
    };
    Checkpoint {
        model: model(router),
        optimizer: AdamW::new(AdamWConfig::default()).unwrap(),
        ema: Some(Ema::new(0.9).unwrap()),
        step: 0,
        state: State {
            grower: grower(),
            order: seeded_rng(11),
        },
    }
}

/// Trains on, with a checkpoint after every step.
fn train(dir: &Path, mut run: Run) -> Run {
    while run.step < STEPS {
        let drawn = run.state.order.random_range(0..1000);
        let Checkpoint {
            model,
            optimizer,
            ema: Some(ema),
            step,
            state,
        } = &mut run
        else {
            panic!("a run without averages")
        };
        advance(
            model,
            optimizer,
            &mut state.grower,
            *step..*step + 1,
            &|_| drawn,
        );
        ema.update(model).unwrap();
        *step += 1;
        announce();
        let snapshot = Snapshot {
            step: run.step,
            model: &run.model,
            optimizer: &run.optimizer,
            ema: run.ema.as_ref(),
            state: &run.state,
        };
        checkpoint::save(dir, &snapshot).unwrap();
        announce();
    }
    run
}

/// A line on the standard output: half a step is done.
fn announce() {
    if std::env::var_os(DIRECTORY).is_some() {
        let mut out = std::io::stdout();
        out.write_all(b"half a step\n")
            .and_then(|()| out.flush())
            .unwrap();
    }
}

/// The process that is killed: a test that trains where the environment says and does nothing otherwise.
#[test]
fn training_process() {
    if let Some(dir) = std::env::var_os(DIRECTORY) {
        let dir = Path::new(&dir);
        let run = if checkpoint::exists(dir) {
            checkpoint::load(dir).unwrap()
        } else {
            begin()
        };
        train(dir, run);
    }
}

fn start(dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "kill::training_process",
            "--nocapture",
            "--quiet",
        ])
        .env(DIRECTORY, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits until the process has announced `count` halves of a step; how many it did, if it ended before.
fn wait_for(child: &mut Child, count: usize) -> usize {
    let out = BufReader::new(child.stdout.as_mut().unwrap());
    let lines = out.lines().map_while(Result::ok);
    lines
        .filter(|line| line.ends_with("half a step"))
        .take(count)
        .count()
}

/// State that is in no tensor: routers with their noise, and what the caller keeps.
fn left_over(run: &Run) -> Vec<serde_json::Value> {
    let routers = (0..run.model.mixtures()).map(|l| run.model.mixture(l).router());
    let routers = routers.map(|r| serde_json::to_value(&*r).unwrap());
    routers
        .chain([serde_json::to_value(&run.state).unwrap()])
        .collect()
}

/// What one killed run showed.
struct Outcome {
    cut_short: bool,
    /// Whether it left a checkpoint of a pool that had grown.
    had_grown: bool,
}

/// Kills a run at a random moment, resumes it and compares its end with that of an uninterrupted one.
fn kill_and_resume(kill: u64, want: &Run) -> Outcome {
    let mut rng = seeded_rng(kill);
    let dir = tempfile::tempdir().unwrap();
    let mut child = start(dir.path());
    // A random half of a step, and a random moment in it.
    let before = rng.random_range(0..2 * STEPS as usize - 2);
    let begun = Instant::now();
    assert_eq!(wait_for(&mut child, before), before, "kill {kill}");
    let half = begun.elapsed() / (before as u32 + 1);
    let moment = half.min(Duration::from_millis(50));
    std::thread::sleep(moment.mul_f64(rng.random::<f64>()));
    child.kill().unwrap();
    let cut_short = !child.wait().unwrap().success();

    // What is left is complete, or nothing was promised yet.
    let mut had_grown = false;
    if checkpoint::exists(dir.path()) {
        let left: Run = checkpoint::load(dir.path()).unwrap();
        assert!(left.step >= before as u64 / 2, "kill {kill}");
        had_grown = left.model.mixture(0).ids().len() > 3;
    } else {
        assert!(before < 2, "kill {kill}: a checkpoint was announced");
    }
    let mut child = start(dir.path());
    wait_for(&mut child, usize::MAX);
    assert!(child.wait().unwrap().success(), "kill {kill}");
    let got: Run = checkpoint::load(dir.path()).unwrap();
    assert_eq!(got.step, STEPS, "kill {kill}");
    assert_eq!(
        all_values(&got.model),
        all_values(&want.model),
        "kill {kill}"
    );
    assert_eq!(got.optimizer.state(), want.optimizer.state(), "kill {kill}");
    assert_eq!(got.ema, want.ema, "kill {kill}");
    assert_eq!(left_over(&got), left_over(want), "kill {kill}");
    Outcome {
        cut_short,
        had_grown,
    }
}

#[test]
fn fifty_kills_change_no_bit_of_the_outcome() {
    let uninterrupted = tempfile::tempdir().unwrap();
    let want = train(uninterrupted.path(), begin());
    assert!(
        want.model.mixture(0).ids().len() > 3,
        "the pool has not grown"
    );
    // Side by side: most of a run is waiting for the disk to confirm.
    let next = AtomicU64::new(0);
    let outcomes = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let kill = next.fetch_add(1, Ordering::Relaxed);
                    if kill >= KILLS {
                        break;
                    }
                    let outcome = kill_and_resume(kill, &want);
                    outcomes.lock().unwrap().push(outcome);
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().unwrap();
    assert_eq!(outcomes.len() as u64, KILLS);
    // Else the test would have shown nothing.
    let count = |f: fn(&Outcome) -> bool| outcomes.iter().filter(|o| f(o)).count();
    let (cut_short, had_grown) = (count(|o| o.cut_short), count(|o| o.had_grown));
    assert!(cut_short > 25, "{cut_short} were cut short");
    assert!(had_grown > 10, "{had_grown} had grown");
}
