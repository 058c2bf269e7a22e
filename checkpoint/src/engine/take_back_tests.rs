//! When a committed migration may be taken back, and what others hear of it then.

use super::*;
use crate::agent::LOCAL;
use crate::engine::fixture::idle_agent;
use crate::engine::recover::fate;
use crate::net::msg::Fate;

const ID: MigrationId = MigrationId([7; 16]);

fn record(state: State) -> Record {
    let mut record = Record::new(ID, "web", "10.0.0.2:7477");
    (record.state, record.plan) = (state, serde_json::json!({}));
    record
}

#[test]
fn what_a_destination_says_of_the_container_is_understood() {
    let heard = |answer| Heard::from(Sight::Answers(answer));
    assert_eq!(heard(Answer::Has(true)), Heard::Holds);
    assert_eq!(heard(Answer::Has(false)), Heard::Lost);
    assert!(matches!(heard(Answer::Done), Heard::Odd(_)));
    assert_eq!(Heard::from(Sight::Silence("no route".into())), Heard::Silence("no route".into()));
}

#[test]
fn a_destination_that_may_be_alive_keeps_the_container_whatever_the_administrator_says() {
    let mut record = record(State::Committed);
    let elsewhere = Heard::Elsewhere(vec!["10.0.0.3:7477".into()]);
    for (heard, word) in [
        (Heard::Holds, "goes on by itself"),
        (Heard::Odd("version 9".into()), "version 9"),
        (elsewhere, "answers 10.0.0.3:7477"),
    ] {
        for sure in [false, true] {
            let why = allowed(&record, &heard, sure).unwrap_err();
            assert!(why.contains("10.0.0.2:7477") && why.contains(word), "{why}");
        }
    }
    let silence = Heard::Silence("no route".into());
    let why = allowed(&record, &silence, false).unwrap_err();
    for word in ["no route", "--destination-is-gone", "may have run there", "two copies", "Nothing was changed"] {
        assert!(why.contains(word), "{word}: {why}");
    }
    assert_eq!(allowed(&record, &silence, true), Ok(()));
    assert_eq!(allowed(&record, &Heard::Lost, false), Ok(()), "it says itself that there is no other copy");

    record.resumed = true;
    assert!(allowed(&record, &silence, false).unwrap_err().contains("has gone on there"));
    assert_eq!(allowed(&record, &silence, true), Ok(()));
    assert!(allowed(&record, &Heard::Lost, true).unwrap_err().contains("ends by itself"), "it had its life there");
}

#[test]
fn a_migration_is_found_by_its_container_and_by_its_id_and_only_while_it_is_open() {
    let of = |n: u8, state| Record { id: MigrationId([n; 16]).to_string(), ..record(state) };
    assert!(find(vec![of(1, State::Finished), of(2, State::Aborted), of(3, State::Started)], "web").is_err());
    let restored = Record { plan: serde_json::Value::Null, ..of(4, State::TakenBack) };
    let checkpoint = Record { kind: Kind::Checkpoint, ..of(5, State::Committed) };
    assert!(find(vec![restored, checkpoint], "web").is_err());
    for state in [State::Committed, State::TakenBack] {
        let record = of(6, state);
        assert_eq!(find(vec![of(1, State::Finished), record.clone()], "web"), Ok(record));
    }
    let two = vec![of(7, State::Committed), of(8, State::Committed)];
    let why = find(two.clone(), "web").unwrap_err();
    assert!(why.contains(&two[0].id) && why.contains(&two[1].id), "{why}");
    assert_eq!(find(two.clone(), &two[1].id), Ok(two[1].clone()));
}

#[test]
fn whoever_asks_hears_that_it_was_taken_back_and_peers_are_free() {
    let dir = tempfile::tempdir().unwrap();
    let agent = idle_agent(dir.path());
    let mut record = record(State::Committed);
    record.peers = vec![(LOCAL.into(), vec!["db".into()])];
    agent.records.write(&record).unwrap();
    assert_eq!(fate(&agent, ID), Fate::Committed);
    agent.claim(ID, None, 0, &["db".to_owned()]).unwrap();
    agent.hold_container(ID, "web").unwrap();
    give_up(&agent, ID, &mut record, &Heard::Silence("no route".into())).unwrap();
    assert_eq!(agent.records.read(ID).unwrap(), Some(record.clone()));
    assert_eq!(fate(&agent, ID), Fate::TakenBack);
    assert_eq!(tell_peers(&agent, ID, &record), Vec::<String>::new());
    for container in ["db", "web"] {
        agent.hold_container(MigrationId([8; 16]), container).unwrap();
    }
}

#[test]
fn peers_are_let_go_and_what_arrived_here_is_not_the_peers_business() {
    let dir = tempfile::tempdir().unwrap();
    let agent = idle_agent(dir.path());
    agent.claim(ID, None, 0, &["db".to_owned()]).unwrap();
    agent.take_over(ID, "web", "10.0.0.1:1");
    agent.forsake(ID);
    let other = MigrationId([8; 16]);
    assert_eq!(agent.hold_container(other, "db"), Ok(()));
    assert_eq!(agent.hold_container(other, "web"), Err(ID), "its end is still to come");
}

#[test]
fn whoever_works_on_it_is_told_to_stop_and_nobody_else_begins() {
    let dir = tempfile::tempdir().unwrap();
    let agent = idle_agent(dir.path());
    let worker: Arc<Cancel> = Arc::default();
    lock(&agent.running).insert(ID, worker.clone());
    assert_eq!(Slot::is_free(&agent, ID), Ok(()), "one that can be told to stop is no reason to refuse");
    let (cancel, late) = (Cancel::default(), Cancel::default());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !worker.is_given_up() {
                std::thread::sleep(LOOK);
            }
            lock(&agent.running).remove(&ID);
        });
        let slot = Slot::take(&agent, ID, STOPS, &cancel).unwrap();
        late.set("Ctrl-C");
        assert_eq!(Slot::take(&agent, ID, STOPS, &late).err(), Some("Ctrl-C".into()), "it is taken");
        assert!(Slot::is_free(&agent, ID).unwrap_err().contains("another `migrrdma recover`"));
        drop(slot);
        assert_eq!(Slot::is_free(&agent, ID), Ok(()));
        assert!(lock(&agent.running).is_empty());
    });
}

#[test]
fn memory_becomes_part_of_the_image_once_and_what_is_needed_and_not_there_is_named() {
    let [base, dir, back] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let images = base.path().join("images");
    fs::create_dir(&images).unwrap();
    let needed = |names: &[&str]| names.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
    let save = |names: &[&str], dir| save_memory(base.path(), &needed(names), dir);
    save(&[], None).unwrap();
    assert!(!memory_image::is_in(&images), "nothing for nothing");
    let content = vec![7; 4096];
    fs::write(dir.path().join("7.1"), &content).unwrap();
    assert!(save(&["7.1"], None).unwrap_err().contains("7.1"));
    let why = save(&["7.1", "7.2"], Some(dir.path())).unwrap_err();
    assert!(why.contains("(7.2)"), "{why}");
    assert!(!memory_image::is_in(&images), "an image without some of it is none");

    save(&["7.1"], Some(dir.path())).unwrap();
    assert_eq!(fs::read_dir(base.path()).unwrap().count(), 1, "nothing is left beside the image");
    memory_image::load(&images, back.path()).unwrap();
    assert!(fs::read(back.path().join("7.1")).unwrap() == content);
    // The files went with the container; the image is asked no more.
    save(&["7.1"], None).unwrap();
}
