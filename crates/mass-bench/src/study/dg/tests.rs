use mass_cpd::AnyDetectorParams;
use mass_expand::AlignmentThreshold;

use clap::Parser;

use super::method::{growth, mixture_blocks};
use super::plan::{Plan, delta};
use crate::cli::{Cli, Command, Variant};
use crate::study::mass::MassSetting;

fn setting(variant: Variant) -> MassSetting {
    MassSetting {
        variant,
        p: 0.3,
        live_percent: Some(60),
        experts: 6,
        experts_max: 8,
        loose: false,
    }
}

#[test]
fn mixtures_are_where_gmoe_has_them_and_scale_with_the_depth() {
    assert_eq!(mixture_blocks(12), [8, 10]);
    assert_eq!(mixture_blocks(24), [16, 20]);
    assert_eq!(mixture_blocks(3), [2]);
}

#[test]
fn rules_are_those_of_vision_and_short_runs_shorten_them() {
    for variant in [Variant::Paper, Variant::Reference] {
        for (steps, warmup, window) in [(5000, 250, 450), (2000, 100, 200), (200, 20, 40)] {
            let rules = growth(&setting(variant), 2, steps, 0.002, 0).controller;
            let Some(AnyDetectorParams::WindowedZ(z)) = rules.watch.expert else {
                panic!("{:?}", rules.watch.expert);
            };
            assert_eq!((z.warmup, z.window), (warmup, window), "{steps}");
            assert_eq!(rules.phase.live_until, steps * 60 / 100);
            assert_eq!(rules.alignment, AlignmentThreshold::Absolute(0.002));
            assert_eq!((rules.k_max, rules.experts), (8, vec![6, 6]));
        }
    }
    for variant in [Variant::Paper, Variant::Reference, Variant::Ours] {
        for steps in [80, 200, 5000] {
            let rules = growth(&setting(variant), 2, steps, 0.002, 0);
            rules.controller.check().unwrap();
        }
    }
}

#[test]
fn a_set_has_one_name_however_domainbed_writes_it() {
    let dir = tempfile::tempdir().unwrap();
    let models = dir.path().join("vit-s14");
    std::fs::create_dir_all(&models).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::write(models.join(file), "").unwrap();
    }
    for domain in ["here", "there"] {
        let class = dir.path().join("PACS").join(domain).join("dog");
        std::fs::create_dir_all(&class).unwrap();
        std::fs::write(class.join("a.png"), "").unwrap();
    }
    let at = dir.path().to_str().unwrap();
    for task in ["pacs", "PACS", "PACS/there"] {
        let arguments = [
            "mass-bench",
            "reproduce",
            "dg",
            "--data",
            at,
            "--models",
            at,
        ];
        let cli = Cli::try_parse_from(arguments.into_iter().chain(["--task", task])).unwrap();
        let Command::Reproduce(command) = cli.command else {
            panic!("another command");
        };
        let args = &command.check().unwrap()[0];
        let runs = Plan::of(args).unwrap().runs(args).unwrap();
        assert!(!runs.is_empty());
        for planned in runs {
            assert_eq!(planned.set, "pacs", "{task}");
            assert!(planned.run.task.unwrap().starts_with("pacs/"), "{task}");
        }
    }
    assert_eq!((delta("pacs"), delta("terra_incognita")), (0.002, 0.001));
}
