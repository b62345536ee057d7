//! What the paper reports for DomainBed (arXiv 2512.19765), accuracy in percent on unseen domains, averaged over them.

/// The sets, by the names of their directories.
pub const SETS: [&str; 4] = ["pacs", "vlcs", "office_home", "terra_incognita"];

/// Domains of each of them.
pub const DOMAINS: usize = 4;

/// Method, as the study names it; experts at the start, where a row is for one number of them; percent on each set. ERM is a
/// ViT-S/16 without mixtures.
const ROWS: [(&str, Option<usize>, [f64; 4]); 6] = [
    ("erm", None, [86.2, 79.7, 72.2, 42.0]),
    ("gmoe", Some(4), [88.2, 79.8, 73.5, 47.8]),
    ("gmoe", Some(6), [88.1, 80.2, 74.2, 48.5]),
    ("gmoe", Some(8), [88.2, 80.0, 74.2, 47.2]),
    ("dynmoe", None, [88.4, 79.4, 73.6, 46.6]),
    ("mass", None, [88.7, 81.1, 73.8, 47.5]),
];

/// The accuracy, 0 to 1, that the paper reports for a method on a set, a mean over its domains: `None` where it has none.
///
/// ```
/// use mass_bench::dg::reported::accuracy;
/// assert_eq!(accuracy("gmoe", Some(6), "pacs"), Some(0.881));
/// assert_eq!(accuracy("gmoe", Some(5), "pacs"), None);
/// ```
#[must_use]
pub fn accuracy(method: &str, experts: Option<usize>, set: &str) -> Option<f64> {
    let column = SETS.iter().position(|s| *s == set)?;
    let fits =
        |row: &&(_, Option<_>, _)| row.0 == method && row.1.is_none_or(|e| experts == Some(e));
    let percent = ROWS.iter().find(fits)?.2[column];
    Some((percent * 10.0).round() / 1000.0)
}
