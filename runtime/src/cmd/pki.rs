//! `pki`: certificates for those who have no authority of their own.

use anyhow::Result;
use checkpoint::pki;

use crate::cli::PkiVerb;

pub fn run(verb: &PkiVerb) -> Result<i32> {
    match verb {
        PkiVerb::Init { dir } => {
            pki::init(dir)?;
            println!("made {0}/ca.pem and {0}/ca.key; keep the key where only you can read it", dir.display());
        }
        PkiVerb::Issue { dir, name, ip, dns } => {
            let issued = pki::issue(dir, name, ip, dns)?;
            println!("made {} and {}", issued.cert.display(), issued.key.display());
            println!(
                "copy them to {name} as /etc/migrrdma/pki/node.pem and node.key, with {}/ca.pem beside them",
                dir.display()
            );
        }
    }
    Ok(0)
}
