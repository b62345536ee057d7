use mass_cuda::{Buffer, CudaError, Device, View};

use super::emulator::{Word, device, get};

#[test]
fn values_go_there_and_back() {
    on_device!();
    let device = device();
    let numbers: Vec<u32> = (0..1000).collect();
    let mut buffer = Buffer::from_slice(&device, &numbers).unwrap();
    assert_eq!(buffer.to_vec().unwrap(), numbers);
    assert_eq!(
        buffer.view().range(10..13).unwrap().to_vec().unwrap(),
        [10, 11, 12]
    );
    buffer
        .view_mut()
        .range(1..3)
        .unwrap()
        .upload(&[7, 8])
        .unwrap();
    let copy = buffer.try_clone().unwrap();
    buffer.view_mut().clear().unwrap();
    assert_eq!(
        copy.view().range(0..4).unwrap().to_vec().unwrap(),
        [0, 7, 8, 3]
    );
    assert_eq!(buffer.to_vec().unwrap(), [0; 1000]);
    assert_eq!(
        Buffer::from_slice(&device, &[1.5_f64, -2.0])
            .unwrap()
            .to_vec()
            .unwrap(),
        [1.5, -2.0]
    );
    assert_eq!(
        Buffer::from_slice(&device, &[-3_i32])
            .unwrap()
            .to_vec()
            .unwrap(),
        [-3]
    );
    assert_eq!(
        Buffer::from_slice(&device, &[u64::MAX])
            .unwrap()
            .to_vec()
            .unwrap(),
        [u64::MAX]
    );
    let nothing = Buffer::<f32>::zeros(&device, 0).unwrap();
    assert!(
        nothing.is_empty()
            && nothing.to_vec().unwrap().is_empty()
            && nothing.try_clone().unwrap().is_empty()
    );
}

#[test]
fn views_do_not_leave_their_buffer() {
    on_device!();
    let device = device();
    let mut buffer = Buffer::<f32>::zeros(&device, 5).unwrap();
    let view: View<'_, f32> = buffer.view();
    #[allow(clippy::reversed_empty_ranges)]
    for bad in [0..6, 6..6, 4..3] {
        assert!(matches!(view.range(bad), Err(CudaError::Length { .. })));
    }
    assert!(view.download(&mut [0.0; 4]).is_err());
    assert!(buffer.view_mut().upload(&[0.0; 6]).is_err());
    assert!(buffer.view_mut().split_at(6).is_err());
    assert!(buffer.view_mut().split([2, 2]).is_err());
    let pieces = buffer.view_mut().split([2, 0, 3]).unwrap();
    assert_eq!(
        pieces.iter().map(|p| p.len()).collect::<Vec<_>>(),
        [2, 0, 3]
    );
    let other = Buffer::<f32>::zeros(&Device::open(0).unwrap(), 5).unwrap();
    assert!(matches!(
        buffer.view_mut().copy_from(other.view()),
        Err(CudaError::OtherDevice { .. })
    ));
}

#[test]
fn what_is_uninitialised_is_nan_and_everything_is_freed() {
    on_device!();
    let device = device();
    let (live, bytes) = (
        get(Word::Allocations) - get(Word::Freed),
        get(Word::LiveBytes),
    );
    let faults = get(Word::Faults);
    let (up, down) = (get(Word::UpBytes), get(Word::DownBytes));
    {
        let a = Buffer::<f32>::uninitialised(&device, 7).unwrap();
        assert!(a.to_vec().unwrap().iter().all(|v| v.is_nan()));
        let b = Buffer::from_slice(&device, &[1.0_f32; 100]).unwrap();
        assert_eq!(get(Word::LiveBytes), bytes + 428);
        drop((a, b));
    }
    assert_eq!(
        (
            get(Word::Allocations) - get(Word::Freed),
            get(Word::LiveBytes)
        ),
        (live, bytes)
    );
    assert_eq!(
        (get(Word::UpBytes) - up, get(Word::DownBytes) - down),
        (400, 28)
    );
    assert_eq!(get(Word::Faults), faults);
    assert!(get(Word::Launches) < u64::MAX && get(Word::DownLargest) >= 28);
}

#[test]
fn the_device_says_what_it_is() {
    on_device!();
    let device = device();
    assert_eq!(Device::count().unwrap(), 1);
    assert_eq!((device.ordinal(), device.compute_capability()), (0, (9, 0)));
    let memory = device.memory().unwrap();
    assert!(memory.total == 8 << 30 && memory.free <= memory.total);
    assert_eq!(format!("{device:?}"), "Device(0, \"emulated GPU\")");
    fn shared<T: Send + Sync>() {}
    shared::<Device>();
    shared::<Buffer<f32>>();
    // From another thread, too.
    let buffer = Buffer::from_slice(&device, &[4.0_f32]).unwrap();
    std::thread::spawn(move || assert_eq!(buffer.to_vec().unwrap(), [4.0]))
        .join()
        .unwrap();
}
