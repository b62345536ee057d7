//! Folders of images: what is read, what is refused, what is kept on disk.

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use image::{DynamicImage, ImageFormat, RgbImage};
use mass_bench::BenchError;
use mass_bench::dg::DgError;
use mass_bench::dg::augment::{Augment, MEAN, STD, normalise};
use mass_bench::dg::decode::{read_square, rgb};
use mass_bench::dg::folder::ImageFolder;
use mass_bench::dg::images::{BadImages, DomainImages, Source};
use mass_bench::dg::sample;
use mass_bench::dg::split::Split;
use mass_bench::prefetch::prefetch;
use mass_bench::rng::{Purpose, stream};

/// 16 x 16 pixels of (200, 30, 60), written by Pillow 12 as a CMYK JPEG.
const CMYK: &[u8] = include_bytes!("dg_cmyk.jpg");

/// 7 x 5 pixels.
fn gradient() -> RgbImage {
    RgbImage::from_fn(7, 5, |x, y| {
        let value = |v: u32| (v % 256) as u8;
        image::Rgb([value(x * 37 + y * 11), value(x * x * 9), value(y * 50)])
    })
}

fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// Two domains of two classes with two images each, a PNG and a JPEG named like each other.
fn set(root: &Path) -> PathBuf {
    let dir = root.join("toys");
    for (d, domain) in ["day", "night"].into_iter().enumerate() {
        for (c, class) in ["cat", "dog"].into_iter().enumerate() {
            let folder = dir.join(domain).join(class);
            fs::create_dir_all(&folder).unwrap();
            let colour = image::Rgb([40 + 100 * d as u8, 60 + 90 * c as u8, 30]);
            let image = DynamicImage::ImageRgb8(RgbImage::from_pixel(12, 9, colour));
            fs::write(folder.join("a.jpg"), encoded(&image, ImageFormat::Png)).unwrap();
            fs::write(folder.join("b.JPEG"), encoded(&image, ImageFormat::Jpeg)).unwrap();
        }
    }
    dir
}

fn read(dir: &Path, bad: BadImages, cache: Option<&Path>) -> Result<DomainImages, DgError> {
    DomainImages::read(dir, 8, bad, cache)
}

#[test]
fn formats_are_told_by_content_and_pixels_survive() {
    let dir = tempfile::tempdir().unwrap();
    let image = DynamicImage::ImageRgb8(gradient());
    for format in [ImageFormat::Png, ImageFormat::Bmp, ImageFormat::WebP] {
        let path = dir.path().join("image.jpg");
        fs::write(&path, encoded(&image, format)).unwrap();
        assert_eq!(
            rgb(&fs::read(&path).unwrap()).unwrap(),
            gradient(),
            "{format:?}"
        );
    }
    // Grey, with and without transparency, 16 bits a channel.
    for kind in [
        image.to_luma8().into(),
        image.to_luma_alpha8().into(),
        image.to_luma16().into(),
    ] {
        let kind: DynamicImage = kind;
        let pixels = rgb(&encoded(&kind, ImageFormat::Png)).unwrap();
        assert!(pixels.pixels().all(|p| p[0] == p[1] && p[1] == p[2]));
        assert_eq!(
            pixels.get_pixel(3, 2)[0],
            image.to_luma8().get_pixel(3, 2)[0]
        );
    }
    let grey = DynamicImage::ImageLuma8(image::GrayImage::from_pixel(9, 9, image::Luma([77])));
    let pixels = rgb(&encoded(&grey, ImageFormat::Jpeg)).unwrap();
    assert!(pixels.pixels().all(|p| p.0 == [77; 3]));
    let pixels = rgb(CMYK).unwrap();
    for (channel, expected) in pixels.get_pixel(8, 8).0.into_iter().zip([200, 30, 60]) {
        assert!(
            channel.abs_diff(expected) <= 2,
            "{:?}",
            pixels.get_pixel(8, 8)
        );
    }
}

#[test]
fn resizing_agrees_with_pillow() {
    // Image.resize((3, 3), Image.BILINEAR) and (9, 9) of the same picture.
    const DOWN: &[u8] = &[
        37, 12, 21, 116, 89, 21, 195, 152, 21, 54, 12, 100, 133, 89, 100, 212, 152, 100, 71, 12,
        179, 150, 89, 179, 177, 152, 179,
    ];
    const UP: &[u8] = &[
        0, 0, 0, 25, 6, 0, 53, 21, 0, 82, 46, 0, 111, 81, 0, 140, 130, 0, 169, 189, 0, 197, 173, 0,
        222, 68, 0, 4, 0, 17, 29, 6, 17, 57, 21, 17, 86, 46, 17, 115, 81, 17, 144, 130, 17, 173,
        189, 17, 201, 173, 17, 226, 68, 17, 10, 0, 44, 35, 6, 44, 63, 21, 44, 92, 46, 44, 121, 81,
        44, 150, 130, 44, 179, 189, 44, 207, 173, 44, 232, 68, 44, 16, 0, 72, 41, 6, 72, 69, 21,
        72, 98, 46, 72, 127, 81, 72, 156, 130, 72, 185, 189, 72, 213, 173, 72, 238, 68, 72, 22, 0,
        100, 47, 6, 100, 75, 21, 100, 104, 46, 100, 133, 81, 100, 162, 130, 100, 191, 189, 100,
        219, 173, 100, 244, 68, 100, 28, 0, 128, 53, 6, 128, 81, 21, 128, 110, 46, 128, 139, 81,
        128, 168, 130, 128, 197, 189, 128, 225, 173, 128, 250, 68, 128, 34, 0, 156, 59, 6, 156, 87,
        21, 156, 116, 46, 156, 145, 81, 156, 174, 130, 156, 203, 189, 156, 222, 173, 156, 228, 68,
        156, 40, 0, 183, 65, 6, 183, 93, 21, 183, 122, 46, 183, 151, 81, 183, 180, 130, 183, 209,
        189, 183, 181, 173, 183, 92, 68, 183, 44, 0, 200, 69, 6, 200, 97, 21, 200, 126, 46, 200,
        155, 81, 200, 184, 130, 200, 213, 189, 200, 156, 173, 200, 10, 68, 200,
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gradient.png");
    let image = DynamicImage::ImageRgb8(gradient());
    fs::write(&path, encoded(&image, ImageFormat::Png)).unwrap();
    for (size, expected) in [(3, DOWN), (9, UP)] {
        let pixels = read_square(&path, size).unwrap().pixels;
        assert_eq!(pixels.len(), expected.len());
        for (i, (ours, theirs)) in pixels.iter().zip(expected).enumerate() {
            assert!(
                ours.abs_diff(*theirs) <= 1,
                "{size}: value {i} is {ours}, not {theirs}"
            );
        }
    }
}

#[test]
fn a_set_is_listed_in_order_and_read_at_one_size() {
    let dir = tempfile::tempdir().unwrap();
    let root = set(dir.path());
    fs::write(root.join("README.txt"), "not an image").unwrap();
    fs::write(root.join("day/cat/.hidden.jpg"), "not an image").unwrap();
    let images = read(&root, BadImages::Refuse, None).unwrap();
    assert_eq!(images.domains, ["day", "night"]);
    assert_eq!(images.classes, ["cat", "dog"]);
    assert_eq!((images.len(), images.passed_over), (8, 2));
    assert_eq!(images.of_domain(1), [4, 5, 6, 7]);
    for i in 0..8 {
        assert_eq!(
            (images.domain(i), images.class(i)),
            (i / 4, (i / 2 % 2) as u32)
        );
        assert_eq!(images.aspect(i), 12.0 / 9.0);
        let expected = [40 + 100 * (i / 4) as u8, 60 + 90 * (i / 2 % 2) as u8, 30];
        for pixel in images.pixels(i).chunks(3) {
            let off = pixel.iter().zip(expected).map(|(a, b)| a.abs_diff(b)).max();
            assert!(
                off.unwrap() <= if i % 2 == 0 { 0 } else { 3 },
                "{i}: {pixel:?}"
            );
        }
    }
}

/// The order of `sorted(os.walk(class))` and the names sorted in each, as torchvision's `make_dataset` has it.
#[test]
fn images_below_a_class_are_read_in_torchvisions_order() {
    let dir = tempfile::tempdir().unwrap();
    let root = set(dir.path());
    let whole = fs::read(root.join("day/cat/b.JPEG")).unwrap();
    let class = root.join("day/cat");
    for name in [
        "z.jpg",
        "sub/b.jpg",
        "sub/a.png",
        "sub/deep/er/c.jpg",
        "sub-1/d.jpg",
        "sub/deep-1/e.jpg",
        "A/f.jpg",
        "é/g.jpg",
        "sub.jpg/h.jpg",
        ".hidden/i.jpg",
        "sub/.j.jpg",
        "sub/notes.txt",
    ] {
        let path = class.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, &whole).unwrap();
    }
    let listed = ImageFolder::open(&root).unwrap();
    let of_class = listed
        .files
        .iter()
        .filter(|f| f.domain == 0 && f.class == 0);
    let names: Vec<&str> = of_class
        .map(|f| f.path.strip_prefix(&class).unwrap().to_str().unwrap())
        .collect();
    assert_eq!(
        names,
        [
            "a.jpg",
            "b.JPEG",
            "z.jpg",
            "A/f.jpg",
            "sub/a.png",
            "sub/b.jpg",
            "sub-1/d.jpg",
            "sub.jpg/h.jpg",
            "sub/deep-1/e.jpg",
            "sub/deep/er/c.jpg",
            "é/g.jpg",
        ]
    );
    assert_eq!(listed.passed_over.len(), 3, "{:?}", listed.passed_over);
    let images = read(&root, BadImages::Refuse, None).unwrap();
    assert_eq!(images.len(), 8 + 9);
    // Another listing, and so another cache.
    let before = listed.digest;
    fs::rename(class.join("sub/b.jpg"), class.join("sub/c.jpg")).unwrap();
    assert_ne!(ImageFolder::open(&root).unwrap().digest, before);
    // A class of which all images lie below.
    fs::rename(root.join("day/dog"), root.join("day/puppy")).unwrap();
    fs::create_dir(root.join("day/dog")).unwrap();
    fs::rename(root.join("day/puppy"), root.join("day/dog/puppy")).unwrap();
    assert_eq!(ImageFolder::open(&root).unwrap().files.len(), 17);
}

/// A link to a folder is followed, and one that leads back is not followed for ever.
#[cfg(unix)]
#[test]
fn links_among_folders_end() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir().unwrap();
    let root = set(dir.path());
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::copy(root.join("day/cat/b.JPEG"), outside.join("o.jpg")).unwrap();
    symlink(&outside, root.join("day/cat/linked")).unwrap();
    symlink(&outside, root.join("day/cat/again")).unwrap();
    symlink(root.join("day/cat"), root.join("day/cat/back")).unwrap();
    let listed = ImageFolder::open(&root).unwrap();
    assert_eq!(listed.files.len(), 10);
    assert!(
        listed
            .files
            .iter()
            .any(|f| f.path.ends_with("linked/o.jpg"))
    );
    assert_eq!(listed.passed_over, [root.join("day/cat/back")]);
}

#[test]
fn several_damaged_images_are_named_together() {
    let dir = tempfile::tempdir().unwrap();
    let (root, cache) = (set(dir.path()), dir.path().join("cache"));
    let damaged = ["day/dog/a.jpg", "night/cat/b.JPEG", "night/dog/a.jpg"];
    for name in damaged {
        fs::write(root.join(name), "<html>").unwrap();
    }
    for cache in [None, Some(cache.as_path())] {
        for _ in 0..2 {
            let error = read(&root, BadImages::Refuse, cache).unwrap_err();
            let text = error.to_string();
            for part in damaged.iter().chain(&["3 files"]) {
                assert!(text.contains(part), "{text}");
            }
            let DgError::Images(files) = &error else {
                panic!("{error:?}");
            };
            let paths: Vec<_> = files.iter().map(|f| f.path.clone()).collect();
            assert_eq!(paths, damaged.map(|name| root.join(name)));
            let bench = BenchError::from(error);
            assert!(
                bench.exit_code() == 2 && bench.to_string() == text,
                "{bench}"
            );
            // The second time from the cache, if there is one.
            let images = read(&root, BadImages::LeaveOut, cache).unwrap();
            assert_eq!((images.len(), images.left_out.len()), (5, 3));
        }
    }
}

#[test]
fn what_is_wrong_with_a_directory_is_said_with_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let layout = |root: &Path, path: &Path, what: &str| {
        let error = ImageFolder::open(root).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(&*path.to_string_lossy()) && text.contains(what),
            "{text}"
        );
        let bench = BenchError::from(error);
        assert!(
            bench.exit_code() == 2 && bench.to_string() == text,
            "{bench}"
        );
    };
    let missing = dir.path().join("nowhere");
    layout(&missing, &missing, "No such file");
    let root = set(dir.path());
    fs::remove_dir_all(root.join("night/dog")).unwrap();
    layout(&root, &root.join("night/dog"), "no class dog");
    fs::create_dir(root.join("night/dog")).unwrap();
    layout(&root, &root.join("night/dog"), "no image");
    fs::remove_dir_all(root.join("night")).unwrap();
    layout(&root, &root, "1 domain(s)");
}

#[test]
fn a_file_that_is_no_whole_image_is_refused_or_left_out_and_named() {
    let photo = DynamicImage::ImageRgb8(RgbImage::from_fn(64, 64, |x, y| {
        image::Rgb([(x * 3) as u8, (y * 3) as u8, (x * y % 251) as u8])
    }));
    let cut = |format, part: f64| {
        let mut bytes = encoded(&photo, format);
        bytes.truncate((bytes.len() as f64 * part) as usize);
        bytes
    };
    let mut thumbnail = cut(ImageFormat::Jpeg, 0.9);
    // A comment that holds the end of another image, as a thumbnail in the metadata does.
    thumbnail.splice(2..2, [0xff, 0xfe, 0x00, 0x04, 0xff, 0xd9]);
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", Vec::new(), "empty"),
        ("text", b"<html>404</html>".to_vec(), "neither JPEG"),
        ("half a JPEG", cut(ImageFormat::Jpeg, 0.5), "truncated JPEG"),
        (
            "almost a JPEG",
            cut(ImageFormat::Jpeg, 0.99),
            "truncated JPEG",
        ),
        ("the start of a JPEG", vec![0xff, 0xd8, 0xff], ""),
        (
            "a JPEG cut after its thumbnail",
            thumbnail,
            "truncated JPEG",
        ),
        ("half a PNG", cut(ImageFormat::Png, 0.5), ""),
        ("half a BMP", cut(ImageFormat::Bmp, 0.5), ""),
        ("half a WebP", cut(ImageFormat::WebP, 0.5), ""),
    ];
    for (name, bytes, what) in cases {
        let dir = tempfile::tempdir().unwrap();
        let root = set(dir.path());
        let bad = root.join("night/cat/b.JPEG");
        fs::write(&bad, bytes).unwrap();
        let error = read(&root, BadImages::Refuse, None).unwrap_err();
        assert!(
            matches!(&error, DgError::Image { path, .. } if *path == bad),
            "{name}: {error}"
        );
        assert!(error.to_string().contains(what), "{name}: {error}");

        let cache = dir.path().join("cache");
        for source in [Source::Decoded, Source::Cache] {
            let images = read(&root, BadImages::LeaveOut, Some(&cache)).unwrap();
            assert_eq!((images.len(), images.left_out.len()), (7, 1), "{name}");
            assert_eq!(images.left_out[0].path, bad);
            assert_eq!(images.source, source);
            assert_eq!((images.class(5), images.domain(5)), (1, 1));
        }
        // What was left out once is not passed on to someone who would refuse it.
        let error = read(&root, BadImages::Refuse, Some(&cache)).unwrap_err();
        assert!(
            matches!(&error, DgError::Image { path, .. } if *path == bad),
            "{name}: {error}"
        );

        fs::write(root.join("night/cat/a.jpg"), "damaged too").unwrap();
        let error = read(&root, BadImages::LeaveOut, None)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("night/cat") && error.contains("none of its files"),
            "{error}"
        );
    }
}

/// A file that cannot be read today may be readable tomorrow, with the same name, length and time.
#[cfg(unix)]
#[test]
fn files_that_could_not_be_read_are_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let (root, cache) = (set(dir.path()), dir.path().join("cache"));
    let link = root.join("night/cat/z.jpg");
    std::os::unix::fs::symlink(dir.path().join("elsewhere.jpg"), &link).unwrap();
    let error = read(&root, BadImages::Refuse, Some(&cache)).unwrap_err();
    assert!(
        matches!(&error, DgError::Io { path, .. } if *path == link),
        "{error}"
    );
    for _ in 0..2 {
        let images = read(&root, BadImages::LeaveOut, Some(&cache)).unwrap();
        assert_eq!(images.source, Source::Decoded);
        assert_eq!(images.left_out.len(), 1);
        assert_eq!(images.left_out[0].path, link);
    }
    assert!(!cache.exists(), "kept without an image that may come back");
}

#[test]
fn pixels_are_kept_until_the_files_change_and_checked_when_read() {
    let dir = tempfile::tempdir().unwrap();
    let (root, cache) = (set(dir.path()), dir.path().join("cache"));
    let again = || read(&root, BadImages::Refuse, Some(&cache)).unwrap();
    let first = again();
    assert_eq!(first.source, Source::Decoded);
    let second = again();
    assert_eq!(second.source, Source::Cache);
    assert_eq!(
        (&second.pixels(3), second.digest()),
        (&first.pixels(3), first.digest())
    );

    let file = fs::read_dir(&cache)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let whole = fs::read(&file).unwrap();
    let mut flipped = whole.clone();
    let middle = flipped.len() - 100;
    flipped[middle] ^= 4;
    let mut longer = whole.clone();
    longer.push(0);
    let mut huge = whole.clone();
    huge[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    for (damaged, what) in [
        (flipped, "checksum"),
        (whole[..whole.len() / 2].to_vec(), "bytes"),
        (whole[..5].to_vec(), "shorter"),
        (longer, "bytes"),
        (huge, "header"),
        (vec![b'x'; whole.len()], "not a file"),
    ] {
        fs::write(&file, damaged).unwrap();
        let mended = again();
        assert!(
            matches!(&mended.source, Source::Repaired(why) if why.contains(what)),
            "{what}: {:?}",
            mended.source
        );
        assert_eq!(mended.pixels(7), first.pixels(7));
        assert_eq!(again().source, Source::Cache);
    }

    // Another size and another listing have files of their own.
    let other = DomainImages::read(&root, 5, BadImages::Refuse, Some(&cache)).unwrap();
    assert_eq!(
        (&other.source, other.pixels(0).len()),
        (&Source::Decoded, 75)
    );
    let bytes = encoded(&DynamicImage::ImageRgb8(gradient()), ImageFormat::Png);
    fs::write(root.join("day/cat/c.png"), bytes).unwrap();
    let grown = again();
    assert_eq!((&grown.source, grown.len()), (&Source::Decoded, 9));
    assert_ne!(grown.digest(), first.digest());

    // The same bytes written anew are another listing and the same set; what was decoded for the old one is gone.
    let file = root.join("day/cat/c.png");
    let bytes = fs::read(&file).unwrap();
    let before = fs::metadata(&file).unwrap().modified().unwrap();
    let later = before + std::time::Duration::from_secs(7);
    fs::write(&file, bytes).unwrap();
    let opened = fs::File::options().write(true).open(&file).unwrap();
    opened.set_modified(later).unwrap();
    let same = again();
    assert_eq!(same.source, Source::Decoded);
    assert_eq!(same.digest(), grown.digest());
    let mut kept: Vec<String> = fs::read_dir(&cache)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    kept.sort();
    let sizes: Vec<&str> = kept.iter().map(|n| n.rsplit('-').nth(1).unwrap()).collect();
    assert_eq!(sizes, ["5", "8"], "{kept:?}");
    // One pixel, or a name.
    let mut pixel = gradient();
    pixel.put_pixel(0, 0, image::Rgb([9, 9, 9]));
    let bytes = encoded(&DynamicImage::ImageRgb8(pixel), ImageFormat::Png);
    fs::write(&file, bytes).unwrap();
    let repainted = again();
    assert_ne!(repainted.digest(), grown.digest());
    for domain in ["day", "night"] {
        fs::rename(root.join(domain).join("cat"), root.join(domain).join("cow")).unwrap();
    }
    let renamed = again();
    assert_eq!(renamed.pixels(8), repainted.pixels(8));
    assert_ne!(renamed.digest(), repainted.digest());
}

#[test]
fn splits_leave_a_domain_out_and_share_nothing() {
    let images = sample::images(8, 10);
    let split = Split::of(&images, Some(2), 0.2, 3).unwrap();
    assert_eq!(split.test, images.of_domain(2));
    assert_eq!(split.held_out.len(), 3 * 8);
    assert!(split.train.iter().all(|t| t.len() == 32));
    let other = Split::of(&images, Some(2), 0.2, 4).unwrap();
    assert_ne!(split.held_out, other.held_out);
    assert_eq!(split, Split::of(&images, Some(2), 0.2, 3).unwrap());

    let with = split.clone().with_probe(4, 5);
    let mut seen: Vec<usize> = with.train.concat();
    assert_eq!(with.probe.len(), 15);
    seen.extend(with.probe.iter().chain(&with.held_out).chain(&with.test));
    seen.sort_unstable();
    assert_eq!(seen, (0..images.len()).collect::<Vec<_>>());

    let batch = split.batch(1, 7, 4);
    assert_eq!((batch.len(), &batch), (12, &split.batch(1, 7, 4)));
    assert!(batch != split.batch(1, 8, 4) && batch != split.batch(2, 7, 4));
    for (domain, part) in [0, 1, 3].into_iter().zip(batch.chunks(4)) {
        assert!(part.iter().all(|&i| images.domain(i) == domain));
    }
    assert!(matches!(
        Split::of(&images, Some(4), 0.2, 0),
        Err(DgError::Split(_))
    ));
    let small = sample::images(8, 1);
    assert!(matches!(
        Split::of(&small, Some(0), 0.2, 0),
        Err(DgError::Split(_))
    ));
}

#[test]
fn augmentation_is_a_function_of_image_and_seed() {
    let images = sample::images(16, 1);
    let apply = |augment: &Augment, index| {
        let mut out = Vec::new();
        let mut rng = stream(5, Purpose::Training, index);
        augment.apply(images.pixels(6), 16, 1.0, &mut rng, &mut out);
        out
    };
    let usual = Augment::default();
    assert_eq!(apply(&usual, 1), apply(&usual, 1));
    assert_ne!(apply(&usual, 1), apply(&usual, 2));
    let mut plain = Vec::new();
    normalise(images.pixels(6), &mut plain);
    assert_eq!(plain.len(), 3 * 16 * 16);
    assert_eq!(
        plain[16 * 16],
        (f32::from(images.pixels(6)[1]) / 255.0 - MEAN[1]) / STD[1]
    );

    // With nothing to draw from, nothing changes; a certain flip mirrors; certain grey has equal channels.
    let none = Augment {
        area: (1.0, 1.0),
        aspect: (1.0, 1.0),
        flip: 0.0,
        jitter: 0.0,
        grey: 0.0,
    };
    let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
    assert!(near(&apply(&none, 0), &plain));
    let flipped = apply(&Augment { flip: 1.0, ..none }, 0);
    let mirrored: Vec<f32> = plain
        .chunks(16)
        .flat_map(|row| row.iter().rev().copied())
        .collect();
    assert!(near(&flipped, &mirrored));
    let grey = apply(&Augment { grey: 1.0, ..none }, 0);
    for i in 0..256 {
        let channels = [0, 1, 2].map(|c| grey[c * 256 + i] * STD[c] + MEAN[c]);
        assert!(
            (channels[0] - channels[1]).abs() < 1e-5 && (channels[1] - channels[2]).abs() < 1e-5
        );
    }
    // Values stay colours.
    for index in 0..20 {
        let out = apply(&usual, index);
        let colour = |(i, v): (usize, &f32)| v * STD[i / 256] + MEAN[i / 256];
        assert!(
            out.iter()
                .enumerate()
                .map(colour)
                .all(|v| (-1e-5..=1.0 + 1e-5).contains(&v))
        );
    }
}

#[test]
fn batches_come_in_order_and_an_early_end_stops_their_maker() {
    let made = std::sync::atomic::AtomicU64::new(0);
    let make = |step: u64| {
        made.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        step
    };
    let taken = prefetch(0..1000, 2, make, |batches| {
        batches.take(3).collect::<Vec<_>>()
    });
    assert_eq!(taken, [0, 1, 2]);
    assert!(made.into_inner() <= 8);
    let slow = |step| {
        std::thread::sleep(std::time::Duration::from_millis(5));
        step
    };
    let waited = prefetch(0..3, 1, slow, |batches| {
        assert_eq!(batches.by_ref().count(), 3);
        batches.waited()
    });
    assert!(waited > std::time::Duration::ZERO);
}

#[test]
fn features_are_kept_until_trunk_or_images_change_and_checked_when_read() {
    use mass_bench::dg::features::Features;
    use mass_model::Parameters;
    use mass_model::vit::{VitClassifier, VitConfig};
    let dir = tempfile::tempdir().unwrap();
    let config = VitConfig {
        hidden_size: 16,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        intermediate_size: 32,
        image_size: 8,
        patch_size: 4,
        initializer_range: 0.2,
        ..VitConfig::default()
    };
    let mut rng = stream(1, Purpose::Weights, 0);
    let mut model = VitClassifier::new(&config, 4, &mut rng).unwrap();
    let images = sample::images(8, 3);
    let features = |model: &VitClassifier, images: &DomainImages| {
        let computed = Features::compute(model, images, 2, Some(dir.path()), &mut |_| true);
        computed.unwrap().unwrap()
    };
    let first = features(&model, &images);
    assert!(!first.from_cache);
    assert_eq!((first.tokens, first.dim, first.blocks), (5, 16, 2));
    // As the model makes them of the images alone.
    let pixels = mass_bench::dg::features::pixels(&images, &[7, 2]);
    let direct = model.features(&pixels, (8, 8), 2).unwrap();
    let kept = first.rows(&[7, 2]);
    assert!(kept.iter().zip(&direct).all(|(a, b)| (a - b).abs() < 1e-5));
    let second = features(&model, &images);
    assert!(second.from_cache && second.rows(&[7, 2]) == kept);

    let file = fs::read_dir(dir.path()).unwrap().next().unwrap();
    let file = file.unwrap().path();
    let whole = fs::read(&file).unwrap();
    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 4;
    for damaged in [flipped, whole[..whole.len() / 2].to_vec(), Vec::new()] {
        fs::write(&file, damaged).unwrap();
        let again = features(&model, &images);
        assert!(!again.from_cache && again.rows(&[7, 2]) == kept);
        assert!(features(&model, &images).from_cache);
    }
    // Told to stop, nothing is kept; other images and another trunk have features of their own, a later block's change has not.
    assert!(!features(&model, &sample::images(8, 2)).from_cache);
    let change = |model: &mut VitClassifier, block: &str| {
        model.visit_mut("", &mut |name, p| {
            if name.starts_with(block) {
                p.values_mut().iter_mut().for_each(|x| *x += 0.01);
            }
        });
    };
    change(&mut model, "blocks.2.");
    assert!(features(&model, &images).from_cache);
    change(&mut model, "blocks.1.");
    assert!(!features(&model, &images).from_cache);
    // The same weights make something else with other heads, epsilon or activation.
    let others = [
        VitConfig {
            num_attention_heads: 4,
            ..config.clone()
        },
        VitConfig {
            layer_norm_eps: 1e-3,
            ..config.clone()
        },
        VitConfig {
            hidden_act: mass_model::Activation::Relu,
            ..config.clone()
        },
    ];
    for other in others {
        let mut rng = stream(1, Purpose::Weights, 0);
        let other = VitClassifier::new(&other, 4, &mut rng).unwrap();
        let made = features(&other, &images);
        assert!(!made.from_cache && made.rows(&[7, 2]) != kept);
    }
    // Images have three channels; nothing is made of a third of one.
    let grey = VitConfig {
        num_channels: 1,
        ..config.clone()
    };
    let grey = VitClassifier::new(&grey, 4, &mut stream(1, Purpose::Weights, 0)).unwrap();
    let refused = Features::compute(&grey, &images, 2, None, &mut |_| true).unwrap_err();
    assert!(refused.to_string().contains("channels"), "{refused}");
    fs::remove_dir_all(dir.path()).unwrap();
    let stopped = Features::compute(&model, &images, 2, Some(dir.path()), &mut |_| false);
    assert!(stopped.unwrap().is_none() && !dir.path().exists());
}

#[test]
fn sizes_that_no_image_is_resized_to_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = set(dir.path());
    let file = root.join("day/cat/a.jpg");
    for size in [0, 4097, 1 << 20, u32::MAX as usize, usize::MAX] {
        let one = read_square(&file, size).err();
        let all = DomainImages::read(&root, size, BadImages::LeaveOut, None).err();
        for error in [one, all].map(Option::unwrap) {
            assert!(matches!(error, DgError::Size(s) if s == size), "{error}");
            assert_eq!(BenchError::from(error).exit_code(), 2);
        }
    }
    let (mut rng, mut values) = (stream(0, Purpose::Training, 0), Vec::new());
    Augment::default().apply(&[], 0, 1.0, &mut rng, &mut values);
    assert!(values.is_empty());
}
