//! Images of domains.

use std::path::Path;

use mass_bench::dg::folder::ImageFolder;
use mass_bench::dg::images::{BadImages, DomainImages};

/// Every image of PACS, or of whatever set of that name is there, is read and belongs to a class that all domains have.
#[test]
fn golden_every_image_of_pacs_is_read() {
    let data = std::env::var_os("MASS_DATA_DIR").expect("$MASS_DATA_DIR");
    let root = Path::new(&data).join("pacs");
    let listed = ImageFolder::open(&root).unwrap();
    let images = DomainImages::read(&root, 14, BadImages::Refuse, None).unwrap();
    assert_eq!(images.len(), listed.files.len());
    for domain in 0..images.domains.len() {
        for class in 0..images.classes.len() {
            let members = images.of_domain(domain);
            assert!(members.iter().any(|&i| images.class(i) as usize == class));
        }
    }
    // Decoding gave pictures, not fields of one colour.
    let varied = (0..images.len()).filter(|&i| {
        let pixels = images.pixels(i);
        pixels.iter().max() > pixels.iter().min()
    });
    assert!(varied.count() * 100 > images.len() * 99);
}
